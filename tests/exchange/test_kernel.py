"""What is exchanged with the native kernel is what is exchanged without it, to the last bit."""

import pytest
import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors.compression import Compression
from hvd_sketch.memory import Momentum
from tests.support.without_kernel import without_kernel

SHAPES = {"first": (300, 70), "second": (9, 33, 7), "bias": (19,)}
STEPS = 4


def train(comm: Communicator, method: str, ratio: float, momentum: Momentum | None) -> list[Tensor]:
    """The updates, and at the end the residual."""
    compressor = getattr(Compression, method)(ratio=ratio, warmup_steps=0, momentum=momentum)
    layout = compressor.layout((name, torch.empty(shape)) for name, shape in SHAPES.items())
    exchange = compressor.exchange(layout, comm, average=True, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(comm.rank)
    updates = []
    for _ in range(STEPS):
        exchange.submit_all(torch.randn(layout.total, generator=generator) ** 3)
        exchange.run()
        updates.append(exchange.update.clone())
    return [*updates, exchange.memory.residual]


@pytest.mark.parametrize("momentum", [None, Momentum(0.9)])
@pytest.mark.parametrize("ratio", [3.0, 40.0])
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("method", ["sharded", "sketch", "topk"])
def test_the_kernel_changes_nothing(method: str, ranks: int, ratio: float, momentum: Momentum | None) -> None:
    ours = run_in_process(ranks, lambda comm: train(comm, method, ratio, momentum))
    with without_kernel():
        reference = run_in_process(ranks, lambda comm: train(comm, method, ratio, momentum))
    for one, other in zip(ours, reference, strict=True):
        assert all(map(torch.equal, one, other))
