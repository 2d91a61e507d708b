"""Bytes a rank sends in a step do not grow with the number of ranks: by counting, up to 1024 of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.base import Pending
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from tests.support.simulation import heavy_tailed, make, submit

RATIO = 10.0
SHAPES = {"weight": (400, 512), "bias": (40,)}  # shards alike for all numbers of ranks, as `Alike` has it
TOTAL = 204_840
SPARSIFIERS = [
    Compression.sketch(ratio=RATIO, warmup_steps=0),
    Compression.sketch(ratio=RATIO, warmup_steps=0, in_turn=0.75, oversampling=2.0, buckets=2),
    Compression.topk(ratio=RATIO, warmup_steps=0),
    Compression.sharded(ratio=RATIO, warmup_steps=0),
    Compression.sharded(ratio=RATIO, warmup_steps=0, buckets=3),
    Compression.stride(ratio=RATIO, warmup_steps=0),
]
KINDS = [*SPARSIFIERS, Compression.powersgd(rank=2, start_step=0)]


class Alike(Communicator):
    """One of ``size`` ranks that all do the same."""

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return self._size

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor.mul_(self._size))

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor.repeat(self._size, 1))

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor[:1].repeat(self._size, 1))

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        return


def bytes_of_a_step(compressor: Compressor, comm: Communicator) -> int:
    """Those of the third step: what the first ones find out about scales does not count."""
    exchange = make(compressor, comm, SHAPES)
    before = 0
    for step in range(3):
        before = exchange.stats.bytes_sent
        submit(exchange, heavy_tailed(TOTAL, seed=step))
        exchange.run()
    assert torch.isfinite(exchange.update).all()
    return exchange.stats.bytes_sent - before


@pytest.mark.parametrize("compressor", KINDS, ids=lambda kind: type(kind).__name__)
def test_bytes_do_not_grow_from_16_to_1024_ranks(compressor: Compressor) -> None:
    sizes = [2**power for power in range(4, 11)]
    sent = [bytes_of_a_step(compressor, Alike(size)) for size in sizes]
    messages = [count * size / (2 * (size - 1)) for count, size in zip(sent, sizes, strict=True)]
    assert max(messages) <= 1.02 * messages[0]
    if compressor in SPARSIFIERS:
        assert max(sent) <= 2 * 4 * TOTAL / RATIO


@pytest.mark.parametrize("compressor", KINDS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("size", [16, 32])
def test_ranks_that_run_send_the_bytes_that_were_counted(compressor: Compressor, size: int) -> None:
    ran = run_in_process(size, lambda comm: bytes_of_a_step(compressor, comm))
    assert set(ran) == {bytes_of_a_step(compressor, Alike(size))}
