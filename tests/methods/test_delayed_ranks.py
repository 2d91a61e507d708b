"""Gradients one step late over each backend: beside collectives of the script's own, and an end without a word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, DistributedOptimizer
from tests.support.ranks import Launcher, ranks
from tests.support.training import flat, loss, net

STEPS = 6


def train_beside(launcher: Launcher) -> tuple[Tensor, list[float], int]:
    """Train while the main thread sums something in the same group; the last update is never applied."""
    if launcher == "mpirun":
        from mpi4py import MPI

        comm, rank = MPI.COMM_WORLD, MPI.COMM_WORLD.Get_rank()

        def total(value: float) -> float:
            return float(comm.allreduce(value))
    elif launcher == "torchrun":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        comm, rank = dist.new_group(), dist.get_rank()

        def total(value: float) -> float:
            summed = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(summed, group=comm)
            return float(summed)
    else:
        import horovod.torch as hvd

        hvd.init()
        comm, rank = None, hvd.rank()

        def total(value: float) -> float:
            summed = hvd.allreduce(torch.tensor([value], dtype=torch.float64), op=hvd.Sum, name="of the script")
            return float(summed)

    told = []
    for compression in (Compression.none, Compression.sharded(ratio=10.0, warmup_steps=0)):
        model = net()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), compression, comm=comm, delayed=True
        )
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, rank, step).backward()
            optimizer.step()
            told.append(total(float(rank + 2 * step)))
    return flat(model), told, optimizer.exchange.stats.steps


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun", "horovodrun-gloo"])
def test_ranks_train_one_model_beside_collectives_of_the_script_and_end(launcher: Launcher) -> None:
    (one, told, steps), (other, _, _) = ranks(2, train_beside, launcher, launcher=launcher)
    assert torch.equal(one, other)
    assert told == [1.0 + 4.0 * step for step in range(STEPS)] * 2
    assert steps == STEPS
