"""What a rank does in a soak, and what it holds meanwhile."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

import hvd_sketch as hvd
from hvd_sketch.comm import Communicator, as_communicator, default_communicator
from tests.support.methods import METHODS, fresh, train

_STEPS = 20
_ROUNDS = 10
"""At least, and the first fifth of them is left out: it fills what is kept from call to call."""
_GROWTH = 4 << 20
"""Bytes that the second half of the rounds may hold beyond the first: what an allocator keeps moves by a few."""


class Held(NamedTuple):
    """What a process holds after a round: bytes of memory, threads, open files."""

    memory: int
    threads: int
    files: int


def soak(seconds: float, use_mpi4py: bool) -> list[Held]:
    """Wrap, train and drop with every method in turn, until the time is over on rank 0."""
    hvd.init()
    comm = default_communicator()
    if use_mpi4py:
        from mpi4py import MPI

        comm = as_communicator(MPI.COMM_WORLD)
    process, end, seen = psutil.Process(os.getpid()), time.monotonic() + seconds, list[Held]()
    while _goes_on(comm, len(seen) < _ROUNDS or time.monotonic() < end):
        for method in METHODS.values():
            model, optimizer = fresh(method, comm)
            train(optimizer, model, comm.rank, range(_STEPS))
            del model, optimizer
        gc.collect()
        seen.append(Held(process.memory_info().rss, process.num_threads(), process.num_fds()))
    return seen


def _goes_on(comm: Communicator, mine: bool) -> bool:
    wanted = torch.tensor([float(mine and comm.rank == 0)])
    comm.allreduce(wanted, "soak")
    return bool(wanted)


def growing(seen: Sequence[Held]) -> str | None:
    """What of it grew, or None."""
    later = seen[len(seen) // 5 :]
    half = len(later) // 2
    first, second = (Held(*map(statistics.median, zip(*part, strict=True))) for part in (later[:half], later[half:]))
    if second.memory - first.memory > _GROWTH or second.threads > first.threads or second.files > first.files:
        return f"in {len(later)} rounds: from {first} to {second}"
    return None
