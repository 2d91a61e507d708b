"""Seconds that an exchange adds to a step.

``max(bytes, transport, posting) + arithmetic + collectives``, where

- bytes: what the busiest interface sends, at the link's rate, with headers;
- transport: what the processors need to move and add them, and posting: to begin so many messages;
- arithmetic: seconds a coordinate, longer by ``(ranks / cores) ** q`` where ranks share cores;
- collectives: half of a cycle where the engine has one, the hops that follow one another times the delay, and, where
  ranks share cores, the time until each of them has one.

With several buckets arithmetic runs while the bytes travel: the larger of the two, and a share of the smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from benchmarks.scale.engines import ENGINES, Group

SOFTWARE = 5e-5  # seconds of a round trip over TCP without any delay
_POST = 3e-5  # seconds of a processor for one message
_LOCAL = 1 / 4e9  # seconds a byte inside a host
_WORD, _HALF_BYTES = 4, ("sketch", "in_turn", "fp16")
_TWICE = {"allreduce": 2}  # a sum is scattered and gathered


@dataclass(frozen=True)
class Fitted:
    """The 17 numbers that are fitted to measured rows.

    Attributes:
        wire: seconds of the link over those of the bytes alone.
        halves: seconds of a core for a byte of half precision moved and added.
        cycle: seconds that a collective of Horovod waits to begin.
        hop, hop_negotiated: seconds of a hop where ranks share cores, without and with Horovod's threads.
        sharing: the exponent ``q`` of ranks over cores.
        overlap: the share of the smaller of bytes and arithmetic that several buckets do not hide.
        powersgd_rank: seconds a coordinate and rank; all others: seconds of a core a coordinate.
    """

    wire: float
    halves: float
    cycle: float
    hop: float
    hop_negotiated: float
    sharing: float
    overlap: float
    sketch: float
    sketch_buckets: float
    in_turn: float
    in_turn_buckets: float
    sharded: float
    sharded_buckets: float
    topk: float
    powersgd: float
    powersgd_rank: float
    fp16: float


@dataclass(frozen=True)
class Exchange:
    """What is exchanged: which arithmetic, by which collectives, and the share of the message in each of them."""

    arithmetic: str
    collectives: tuple[tuple[str, float], ...]
    buckets: bool = False
    powersgd_rank: int = 0


@dataclass(frozen=True)
class Place:
    """Where: ``hosts`` of ``ranks_per_host``, links of ``mbit``, ``delay`` ms apart.

    Attributes:
        coordinates, ratio: of the gradient, and of a dense ring's bytes to those of the exchange.
        shared_cores: cores that all ranks share; 0 where each has one of its own.
        hierarchical: whether a host sums inside before it exchanges, its ranks a part each.
    """

    engine: str
    hosts: int
    coordinates: float
    ratio: float
    mbit: float
    delay: float = 0.0
    ranks_per_host: int = 1
    shared_cores: int = 0
    hierarchical: bool = False

    @property
    def ranks(self) -> int:
        """Members of a collective across hosts."""
        return self.hosts if self.hierarchical else self.hosts * self.ranks_per_host


def _halving(arithmetic: str, *, buckets: bool = False) -> Exchange:
    return Exchange(arithmetic, (("allreduce", 0.5), ("allreduce", 0.5)), buckets)


def _owned(arithmetic: str, *, buckets: bool = False) -> Exchange:
    return Exchange(arithmetic, (("allreduce", 0.0), ("alltoall", 1.0), ("allgather", 1.0)), buckets)


EXCHANGES: Mapping[str, Exchange] = {
    "dense": Exchange("", (("allreduce", 1.0),)),
    "fp16": Exchange("fp16", (("allreduce", 1.0),)),
    "sketch": _halving("sketch"),
    "sketch, 4 buckets": _halving("sketch_buckets", buckets=True),
    "sketch, in turn": _halving("in_turn"),
    "sketch, in turn, 4 buckets": _halving("in_turn_buckets", buckets=True),
    "sharded": _owned("sharded"),
    "sharded, 4 buckets": _owned("sharded_buckets", buckets=True),
    "sharded, header in its codes": Exchange("sharded", (("alltoall", 1.0), ("allgather", 1.0))),
    "topk": Exchange("topk", (("allreduce", 0.0), ("allgather", 2.0))),
    **{
        f"powersgd {rank}": Exchange("powersgd", (("allreduce", 0.5), ("allreduce", 0.5)), powersgd_rank=rank)
        for rank in (1, 2, 4)
    },
}
"""Shares are of ``4 coordinates / ratio`` bytes; what is gathered counts twice where nothing is scattered before."""


def seconds(exchange: str, place: Place, fitted: Fitted) -> float:
    """Seconds that the exchange adds to a step, by the model above; ``exchange`` is one of `EXCHANGES`.

    Delays are those of messages; windows that open slowly, losses and ranks that come late are not in it.
    """
    what, engine = EXCHANGES[exchange], ENGINES[place.engine]
    busy = arithmetic(what, place, fitted)
    moving = max(
        fitted.wire * interface_bytes(what, place) * 8e-6 / place.mbit,
        _transport(what, place, fitted),
        _POST * sum(engine.messages(kind, _group(place, share)) for kind, share in what.collectives),
    )
    longer, shorter = max(busy, moving), min(busy, moving)
    together = longer + (fitted.overlap if what.buckets else 1.0) * shorter
    return together + waiting(what, place, fitted) + _inside(place)


def interface_bytes(what: Exchange, place: Place) -> float:
    """Bytes that a host's interface sends: around a ring once for all its ranks, otherwise for each of them."""
    engine, message = ENGINES[place.engine], _WORD * place.coordinates / place.ratio
    own = 1 if place.hierarchical else place.ranks_per_host
    ring, apart = (place.ranks - 1) / place.ranks, own * (place.hosts - 1) / place.hosts
    shares = (
        share * _TWICE.get(kind, 1) * (apart if engine.from_each_to_each(kind) else ring)
        for kind, share in what.collectives
    )
    return engine.repeated(_group(place, 1.0)) * message * sum(shares)


def arithmetic(what: Exchange, place: Place, fitted: Fitted) -> float:
    """Seconds of a rank's own arithmetic."""
    if not what.arithmetic:
        return 0.0
    coordinate = getattr(fitted, what.arithmetic) + what.powersgd_rank * fitted.powersgd_rank
    parts = place.ranks_per_host if place.hierarchical else 1
    return float(coordinate * place.coordinates / parts * _crowded(place, fitted))


def waiting(what: Exchange, place: Place, fitted: Fitted) -> float:
    """Seconds of the hops that follow one another, and of what comes before each collective."""
    engine, total = ENGINES[place.engine], 0.0
    crowded = fitted.hop_negotiated if engine.negotiates else fitted.hop
    hop = SOFTWARE + 2e-3 * place.delay if engine.round_trips else SOFTWARE / 2 + 1e-3 * place.delay
    for kind, share in what.collectives:
        group = _group(place, share)
        total += fitted.cycle * engine.negotiates + hop * engine.crossings(kind, group)
        total += 2 * (group.ranks - 1) * crowded * (place.shared_cores > 0)
    return total


def _transport(what: Exchange, place: Place, fitted: Fitted) -> float:
    if not what.arithmetic.startswith(_HALF_BYTES):
        return 0.0
    return fitted.halves * interface_bytes(what, place) * _crowded(place, fitted)


def _crowded(place: Place, fitted: Fitted) -> float:
    ranks = place.hosts * place.ranks_per_host
    return max(1.0, ranks / place.shared_cores) ** fitted.sharing if place.shared_cores else 1.0


def _group(place: Place, share: float) -> Group:
    return Group(place.ranks, place.hosts, share * _WORD * place.coordinates / place.ratio)


def _inside(place: Place) -> float:
    """Summing and spreading inside a host, at the speed of its memory."""
    if not place.hierarchical:
        return 0.0
    return 2 * (place.ranks_per_host - 1) / place.ranks_per_host * _WORD * place.coordinates * _LOCAL


def names_of_numbers() -> list[str]:
    """The fitted numbers by name, in order."""
    return [field.name for field in fields(Fitted)]
