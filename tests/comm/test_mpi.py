"""What MPI alone has to be told: whose memory it still uses."""

from __future__ import annotations

import sys

import torch

from hvd_sketch.comm import as_communicator
from tests.support.ranks import launch, ranks

COUNT = 2**20
"""Floats; so many do not arrive at once."""


def dropped() -> tuple[int, int]:
    """Elements of others' memory that were overwritten, and collectives that are still kept."""
    from mpi4py import MPI

    from hvd_sketch.comm.mpi import _forsaken

    comm, spoilt = as_communicator(MPI.COMM_WORLD), 0
    for number in range(12):
        begin = (comm.start_allreduce, comm.start_allgather, comm.post_alltoall)[number % 3]
        begin(torch.ones(2, COUNT // 2) if number % 3 == 2 else torch.ones(COUNT), "dropped")
        others = [torch.zeros(COUNT) for _ in range(4)]
        for _ in range(20):
            comm.allreduce(torch.ones(1), "small")
        spoilt += sum(int(other.count_nonzero()) for other in others)
    while _forsaken:
        comm.allreduce(torch.ones(1), "small")
    return spoilt, len(_forsaken)


def test_a_collective_that_nobody_waits_for_writes_into_no_others_memory() -> None:
    """As after an optimizer was dropped while its messages were under way."""
    assert ranks(2, dropped) == [(0, 0)] * 2


ENDING = """
import torch
from mpi4py import MPI
from hvd_sketch.comm import as_communicator

comm = as_communicator(MPI.COMM_WORLD)
comm.allreduce(torch.ones(1), "first")
under_way = comm.start_allreduce(torch.ones(2**20), "last")
print("through", flush=True)
"""


def test_a_rank_that_ends_with_a_collective_under_way_ends_well() -> None:
    """As after the last step of `OverlapLocalSGD`; MPI would crash, or never end."""
    completed = launch(2, [sys.executable, "-c", ENDING], timeout=60)
    assert completed.returncode == 0, completed.output
    assert completed.output.count("through") == 2
