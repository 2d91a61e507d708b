"""The share that the ranks' memories have in common: against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.common_share import CommonShare

SHAPES = {"few": (3, 8), "many": (50, 40)}
ROUNDING = 0.1
"""Floats of eight bits are off by a sixteenth: one of them on every rank, one of the sum."""

TOPK, SHARDED = Compression.topk(ratio=2.0, dense_below=0), Compression.sharded(ratio=2.0, dense_below=0)


def memories(ranks: int, common: float) -> Tensor:
    """Of every rank: ``common`` times what all have, and noise of its own."""
    generator = torch.Generator().manual_seed(0)
    all_have, own = torch.randn(2024, generator=generator), torch.randn(ranks, 2024, generator=generator)
    return common * all_have + own


def measured(ranks: int, compressor: Compressor, memory: Tensor, draws: int = 1) -> Tensor:
    """The mean of measurements, each of a step of its own, by parameter; the same on all ranks."""

    def exchange_of(comm: Communicator) -> Exchange:
        layout = compressor.layout((name, torch.zeros(shape)) for name, shape in SHAPES.items())
        return compressor.exchange(layout, comm, average=True, device=torch.device("cpu"))

    def on_rank(comm: Communicator) -> Tensor:
        exchange = exchange_of(comm)
        exchange.memory.residual.copy_(memory[comm.rank])
        seen = []
        for step in range(draws):
            shares, exchange.step = CommonShare(), step
            shares.attach(exchange)
            shares.observe(exchange)
            assert shares.shares is not None
            seen.append(shares.shares)
        return torch.stack(seen).mean(dim=0)

    results = run_in_process(ranks, on_rank)
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def defined(memory: Tensor, ranks: int, owned: bool = False) -> list[float]:
    """c of the two parameters, by its definition."""
    errors = memory.clone()
    for rank in range(ranks if owned else 0):
        errors[rank, rank::ranks] /= ranks
    means = memory.mean(dim=0)
    return [
        float(means[part].square().sum() / errors[:, part].square().sum(dim=1).mean())
        for part in (slice(24), slice(24, None))
    ]


@pytest.mark.parametrize("common", [0.0, 1.0])
def test_it_is_right_to_the_rounding_for_few_coordinates_and_in_the_mean_for_many(common: float) -> None:
    memory = memories(4, common)
    few, many = measured(4, TOPK, memory, draws=400)
    exact = defined(memory, 4)
    assert few == pytest.approx(exact[0], rel=ROUNDING)
    assert many == pytest.approx(exact[1], rel=ROUNDING)  # standard error of a quarter over the root of 400 draws: 1 %


def test_an_owner_counts_its_share() -> None:
    memory = memories(4, 0.5)
    few, _ = measured(4, SHARDED, memory)
    assert few == pytest.approx(defined(memory, 4, owned=True)[0], rel=ROUNDING)
    assert few != pytest.approx(defined(memory, 4)[0], rel=2 * ROUNDING)


def test_equal_and_empty_memories_are_common_altogether() -> None:
    assert measured(3, TOPK, torch.ones(3, 2024))[0] == pytest.approx(1.0, rel=ROUNDING)
    assert measured(3, TOPK, torch.zeros(3, 2024)).tolist() == [1.0, 1.0]
    assert measured(1, TOPK, memories(1, 1.0))[0] == pytest.approx(1.0, rel=ROUNDING)
