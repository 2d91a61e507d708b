"""The update on its way to the gradients, before and after somebody asks for it as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import Exchange
from tests.support.compressors import EVERY, TOTAL
from tests.support.simulation import heavy_tailed, make, submit


@EVERY
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_tensors_of_any_kind_get_the_update(compressor: Compressor, factor: float) -> None:
    """Before and after it was asked for as a whole; in steps that are void, and in those that send everything."""
    gradients = heavy_tailed(5, TOTAL)
    gradients[2, 7] = torch.nan

    def tensors(exchange: Exchange) -> dict[int, Tensor]:
        made = {at: torch.full(slot.shape, 9.0) for at, slot in enumerate(exchange.layout.slots)}
        return {at: tensor.half() if at % 3 == 1 else tensor for at, tensor in made.items() if at != 4}

    def body(comm: Communicator) -> None:
        exchange = make(compressor, comm)
        for number, gradient in enumerate(gradients):
            submit(exchange, gradient)
            if number == 3:
                exchange.flush()
            exchange.run()
            early, late = tensors(exchange), tensors(exchange)
            strided = {at: torch.full_like(tensor.t(), 9.0).t() for at, tensor in early.items() if tensor.dim() == 2}
            for written in (early, strided):
                exchange.write_update(written, factor)
            update = exchange.update.clone()
            exchange.write_update(late, factor)
            for at, tensor in [*early.items(), *late.items(), *strided.items()]:
                slot = exchange.layout.slots[at]
                expected = (update[slot.offset : slot.stop].view(slot.shape) * factor).to(tensor.dtype)
                torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)

    run_in_process(2, body)


@pytest.mark.parametrize("method", ["sketch", "sharded"])
def test_an_update_that_nobody_asks_for_as_a_whole_takes_no_memory(method: str) -> None:
    exchange = make(getattr(Compression, method)(ratio=8, warmup_steps=0, buckets=2), SingleProcess())
    for gradient in heavy_tailed(3, TOTAL):
        submit(exchange, gradient)
        exchange.run()
        exchange.write_update({at: torch.empty(slot.shape) for at, slot in enumerate(exchange.layout.slots)})
    assert exchange._update._whole is None
