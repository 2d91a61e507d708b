"""Which ranks share a host, and the two communicators of each rank that an exchange between hosts is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.shared_memory import SharedMemory
from hvd_sketch.errors import ConfigurationError

Asked = bool | int | None
"""Whether ranks are put into groups with one memory each: by host, so many in a row, never, or None, by host where
there are several hosts of several ranks each."""


@dataclass(frozen=True)
class Hosts:
    """Equally many ranks on every host, or in every group that stands for one.

    Attributes:
        local: the ranks of this host.
        across: the ranks of the same number in ``local``, one of every host.
        wanted: whether somebody asked for them, and is not to get anything else.
    """

    local: Communicator
    across: Communicator
    wanted: bool = True

    def __str__(self) -> str:
        return f"{self.across.size} groups of {self.local.size} ranks, with one memory each"


def find_hosts(comm: Communicator, asked: Asked = None) -> tuple[Hosts | None, str]:
    """Collective, unless nothing is to be found: the hosts, None for every rank by itself; and what to log of it.

    Args:
        comm: the ranks.
        asked: see `Asked`; equal on all ranks.

    Raises:
        ConfigurationError: alike on all ranks, for what cannot be had; None never asks for that.
    """
    if asked is False or not comm.included or comm.world_size == 1:
        return None, ""
    if asked is None and (comm.host is None or comm.local[1] >= comm.world_size):
        return None, ""
    if comm.obstacle:
        if asked is None:
            return None, f"each rank has a memory of its own: {comm.obstacle}" if comm.local[1] > 1 else ""
        raise ConfigurationError(f"hierarchical={asked} cannot be had: {comm.obstacle}")
    if comm.size == 1:
        return None, ""
    groups = _rows(comm, asked) if type(asked) is int else _by_host(comm)
    sizes = [len(group) for group in groups]
    if asked is None and (len(groups) == 1 or max(sizes) == 1):
        return None, ""
    if min(sizes) < max(sizes):
        uneven = f"the hosts have {', '.join(map(str, sizes))} ranks"
        if asked is None:
            return None, f"{uneven}, so that each rank has a memory of its own"
        raise ConfigurationError(
            f"hierarchical=True needs hosts of equally many ranks, and {uneven}; start as many on each, or give "
            "hierarchical=<ranks in a group>, which divides their number, or False"
        )
    return _hosts(comm, groups, wanted=asked is not None) if sizes[0] > 1 else None, ""


def _rows(comm: Communicator, size: int) -> list[list[int]]:
    """So many ranks in a row each."""
    if size < 1 or comm.size % size:
        raise ConfigurationError(
            f"hierarchical={size} makes no groups of {comm.size} ranks; give a divisor of their number, or True for "
            "the ranks of a host, or False"
        )
    return [list(range(first, first + size)) for first in range(0, comm.size, size)]


def _by_host(comm: Communicator) -> list[list[int]]:
    """Ranks of the same host, in the order of the first of them."""
    told = comm.allgather_object(comm.host, "hvd_sketch.hosts")
    if None in told:
        raise ConfigurationError(
            f"hierarchical=True, and nobody tells rank {told.index(None)} which ranks share its host; start with "
            "mpirun or torchrun, or give hierarchical=<ranks in a group>"
        )
    return [[rank for rank, its in enumerate(told) if its == host] for host in dict.fromkeys(told)]


def _hosts(comm: Communicator, groups: Sequence[Sequence[int]], *, wanted: bool) -> Hosts:
    mine = next(group for group in groups if comm.rank in group)
    number = mine.index(comm.rank)
    local, across = comm.subgroup(mine), comm.subgroup([group[number] for group in groups])
    return Hosts(SharedMemory(local) if local.sends_by_tcp else local, across, wanted)
