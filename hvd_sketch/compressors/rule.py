"""Which exchange is the fastest that is accurate enough: one rule for what is known of ranks, links and processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvd_sketch import wire
from hvd_sketch.comm import direct
from hvd_sketch.comm.delay import NOTABLE
from hvd_sketch.sparse.codec import SparseCodec

Kind = Literal["dense", "sharded", "sketch"]

ARITHMETIC = 3.4e-9
"""Seconds of a core for a coordinate of a sketch."""

LEAST_CODE = 2 * (SparseCodec.LEVEL_BYTES + wire.SEAL)
"""Bytes of a code to an owner, half of which are levels and checksum then."""

_TWICE = 2.0  # sharded's arithmetic over that of a sketch
_DENSE_MAY_TAKE, _SHARDED_MAY_TAKE = 1.2, 1.5  # times as long: one loses nothing, the other less than a sketch


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the seconds of an exchange depend on, agreed on by all ranks.

    Attributes:
        members: ranks that exchange, or hosts where a host exchanges as one; W.
        coordinates: d, of each member.
        ratio: of a dense exchange's bytes to those of the others.
        crossing: seconds that small messages from all to all take.
        byte: seconds a byte that a member sends.
        arithmetic: seconds a coordinate of a sketch, of a member of which the ranks share the work.
        negotiates: whether the backend asks all ranks before each collective, as Horovod does.
    """

    members: int
    coordinates: float
    ratio: float
    crossing: float = 0.0
    byte: float = 0.0
    arithmetic: float = ARITHMETIC
    negotiates: bool = False

    @property
    def code(self) -> float:
        """Bytes that the ratio leaves for each owner's code."""
        return 4.0 * self.coordinates / self.ratio / self.members


def crossings(kind: Kind, conditions: Conditions) -> float:
    """How many crossings follow one another in a step.

    Over direct messages two, and four for the two sums of a sketch. Around a ring a sum is ``2 (W-1)`` and a gather
    ``W-1``; and to ask before a collective another ``2 (W-1)``.
    """
    around = conditions.members - 1
    if conditions.negotiates:
        return {"dense": 4.0 * around, "sharded": 9.0 * around + 2.0, "sketch": 8.0 * around}[kind]
    if direct.pays(conditions.members, conditions.crossing):
        return {"dense": 2.0, "sharded": 2.0, "sketch": 4.0}[kind]
    return {"dense": 2.0 * around, "sharded": 3.0 * around + 1.0, "sketch": 4.0 * around}[kind]


def seconds(kind: Kind, conditions: Conditions) -> float:
    """Seconds that an exchange adds to a step: crossings, bytes of a ring, own arithmetic."""
    share = 2.0 * (conditions.members - 1) / conditions.members * 4.0 * conditions.coordinates * conditions.byte
    own = conditions.arithmetic * conditions.coordinates
    sent, computed = {
        "dense": (share, 0.0),
        "sharded": (share / conditions.ratio, _TWICE * own),
        "sketch": (share / conditions.ratio, own),
    }[kind]
    return crossings(kind, conditions) * conditions.crossing + sent + computed


def choose(conditions: Conditions) -> Kind:
    """Dense where nothing is much faster; else sharded, unless a sketch is much faster or its codes get too small."""
    dense, sharded, sketch = (seconds(kind, conditions) for kind in ("dense", "sharded", "sketch"))
    possible = conditions.code >= LEAST_CODE
    if dense <= _DENSE_MAY_TAKE * min(sketch, sharded if possible else sketch):
        return "dense"
    if possible and (sharded <= _SHARDED_MAY_TAKE * sketch or _hurts_twice(conditions)):
        return "sharded"
    return "sketch"


def _hurts_twice(conditions: Conditions) -> bool:
    """Whether a second sum is what a sketch would wait for."""
    return not conditions.negotiates and conditions.crossing >= NOTABLE
