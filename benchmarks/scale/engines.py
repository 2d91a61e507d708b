"""How often a collective of each engine crosses the links, one message after another.

A hop of Gloo waits for the receiver's "ready", so it takes a round trip; one of MPI takes the delay one way. Ranks of
a host are neighbours in rank order. Read in the sources of Gloo 70dc360, Horovod 2626dc8 and Open MPI main; that Open
MPI 4.1 reduces along a ring follows from its times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_TREE_BELOW = 65536  # bytes; smaller vectors, and those of fewer than four ranks, go along a tree in Open MPI


@dataclass(frozen=True)
class Group:
    """The ranks of a collective: how many, on how many hosts, and the bytes of the vector."""

    ranks: int
    hosts: int
    size: float


@dataclass(frozen=True)
class Engine:
    """What carries the collectives.

    Attributes:
        round_trips: whether a hop is a round trip, and not one way.
        negotiates: whether ranks agree around a ring before each collective, as Horovod's do: ``2 (W-1)`` hops.
        hops: of each collective, how many follow one another.
        linear: the collectives besides alltoall in which every rank sends to every other one, and not around a ring.
        levels: how many levels of groups a message passes.
    """

    round_trips: bool
    negotiates: bool
    hops: Mapping[str, Callable[[Group], float]]
    linear: tuple[str, ...] = ()
    levels: int = 1

    def crossings(self, kind: str, group: Group) -> float:
        """Hops that follow one another in a collective of this kind, negotiation included."""
        negotiation = 2 * (group.ranks - 1) if self.negotiates else 0
        return negotiation + self.levels * self.hops[kind](group)

    def messages(self, kind: str, group: Group) -> float:
        """What a rank posts: two segments a hop in a ring, or one message for every other member."""
        if self.from_each_to_each(kind):
            return float(self.levels * _DIRECT[kind] * (group.ranks ** (1 / self.levels) - 1))
        return 2 * self.hops[kind](group)

    def repeated(self, group: Group) -> float:
        """Bytes of all levels over those of one: a level passes on its share of the vector."""
        return float(sum(group.ranks ** (-level / self.levels) for level in range(self.levels)))

    def from_each_to_each(self, kind: str) -> bool:
        """Whether every rank sends to every other one in a collective of this kind."""
        return kind == "alltoall" or kind in self.linear


_DIRECT = {"allreduce": 2, "allgather": 1, "alltoall": 1}


def _mpi_allreduce(group: Group) -> float:
    small = group.size < _TREE_BELOW or group.ranks < 4
    return 2 * math.ceil(math.log2(group.hosts)) if small else 2 * (group.hosts - 1)


def _ring(rounds: int) -> Callable[[Group], float]:
    return lambda group: rounds * (group.ranks - 1)


def _constant(hops: int) -> Callable[[Group], float]:
    return lambda group: hops


_GLOO = {"allreduce": _ring(2), "allgather": _ring(1), "alltoall": _constant(1)}
_ONE_BY_ONE = {kind: _constant(hops) for kind, hops in _DIRECT.items()}

ENGINES: Mapping[str, Engine] = {
    "horovod": Engine(True, True, {**_GLOO, "alltoall": _constant(2)}),
    "gloo": Engine(True, False, _GLOO),
    "mpi": Engine(False, False, {**_ONE_BY_ONE, "allreduce": _mpi_allreduce}, ("allgather",)),
    "mpi, direct": Engine(False, False, _ONE_BY_ONE, tuple(_DIRECT)),
    "gloo, direct": Engine(True, False, _ONE_BY_ONE, tuple(_DIRECT)),
    "gloo, direct, two levels": Engine(True, False, _ONE_BY_ONE, tuple(_DIRECT), levels=2),
}
"""Direct: everybody sends to a part's owner, and the owner to everybody. Horovod's alltoall tells the sizes first."""
