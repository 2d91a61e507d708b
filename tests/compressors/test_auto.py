"""The compressor that picks another: which one, and that it then is that one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.compressors.sharded import ShardedExchange
from hvd_sketch.compressors.sketch.exchange import SketchExchange
from hvd_sketch.exchange import Exchange

SHAPES = {"bias": (40,), "weight": (98, 20)}


def exchange_of(compressor: Compressor, comm: Communicator) -> Exchange:
    layout = compressor.layout((name, torch.zeros(shape)) for name, shape in SHAPES.items())
    return compressor.exchange(layout, comm, average=True, device=torch.device("cpu"))


@pytest.mark.parametrize(("ranks", "expected"), [(2, ShardedExchange), (22, ShardedExchange), (23, SketchExchange)])
def test_a_code_of_levels_mostly_is_left_for_a_sketch(ranks: int, expected: type[Exchange]) -> None:
    """2000 parameters at ratio 10 are 800 bytes: 22 codes of 36."""
    auto = Compression.auto(ratio=10.0)
    assert set(run_in_process(ranks, lambda comm: type(exchange_of(auto, comm)))) == {expected}


def test_it_is_the_one_that_it_picks() -> None:
    def updates(compressor: Compressor) -> list[Tensor]:
        def on_rank(comm: Communicator) -> Tensor:
            exchange = exchange_of(compressor, comm)
            for step in range(4):
                generator = torch.Generator().manual_seed(100 * step + comm.rank)
                exchange.submit_all(torch.randn(2000, generator=generator))
                exchange.run()
            return exchange.update.clone()

        return run_in_process(3, on_rank)

    settings: dict[str, Any] = {"ratio": 10.0, "warmup_steps": 2, "clip_norm": None, "buckets": 2}
    for picked, sharded in zip(
        updates(Compression.auto(**settings)), updates(Compression.sharded(**settings)), strict=True
    ):
        assert torch.equal(picked, sharded)
