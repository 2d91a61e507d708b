"""One group of processes for all that the methods with a server do on real ranks and survive."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.methods.server import asynchronous, finite_sum, tiers
from tests.support.ranks import ranks


class OnRank(NamedTuple):
    """What one rank of five saw; the last has no part in what takes four."""

    asynchronous: asynchronous.OnMpi | None
    finite_sum: finite_sum.OnMpi
    tiers: tiers.Federated


class Together(NamedTuple):
    """What all ranks saw, and where the servers' logs are."""

    ranks: list[OnRank]
    folder: Path


def on_5_ranks(folder: str) -> OnRank:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    four = world.Split(world.rank == 4)
    first = asynchronous.on_4_ranks(four, folder) if world.rank < 4 else None
    sleep_until_all_are_here(world)
    return OnRank(first, finite_sum.on_ranks(world), tiers.federate(world, 2.0))


def sleep_until_all_are_here(comm: Any) -> None:
    """A barrier that leaves the processor to the others."""
    here = comm.Ibarrier()
    while not here.Test():
        time.sleep(0.02)


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("servers")
    return Together(ranks(5, on_5_ranks, str(folder), timeout=280), folder)
