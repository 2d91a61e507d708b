"""Two-way top-k over owners: compressed on the way up and on the way down, bytes constant in the ranks."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.compressors.base import Bucketed
from hvd_sketch.exchange import Exchange, Part, Setting
from hvd_sketch.exchange.budget import unreachable
from hvd_sketch.exchange.intake import Factor, Finite
from hvd_sketch.exchange.sparse import SparseExchange, dense_nbytes
from hvd_sketch.gpu import Recorded
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Memory
from hvd_sketch.sparse.codec import SparseCodec
from hvd_sketch.sparse.heaviest import heaviest_of_shards
from hvd_sketch.sparse.rows import Rows, add

_KEEPING = 2e-9
"""Seconds of a processor to keep a coordinate of the memory, so that the step can be undone."""

_LEAST_PAIRS = 8 * (SparseCodec.LEVEL_BYTES + wire.SEAL)
"""Of a part of a shard: a tenth of the code's bytes are levels and checksum then."""

Codes = list[tuple[slice, SparseCodec]]
"""Parts of the compressed coordinates, each with the code for every shard of it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded(Bucketed):
    """Two-way top-k over owners: compressed up and down, four-bit values; see `ShardedExchange`.

    Its bytes do not grow with the number of ranks, and every rank gets its own heavy coordinates
    through to their owner, where they are summed before the second selection.

    Attributes:
        dense_below: 0, so that 1-D tensors are compressed like the others: on small models they would
            take a large part of the bytes.
        half: the dense part travels as float16, on more than 128 ranks as float32; what is rounded off stays in
            the memory.
    """

    dense_below: int | None = 0
    half: bool = True

    def fit(self, layout: Layout, ratio: float, ranks: int) -> Codes:
        """The codes that a rank sends to each owner, and an owner to everybody.

        Up and down together send ``2 (W-1) codes' bytes`` where a dense allreduce sends ``2 (W-1)/W 4 total``,
        so the codes of all buckets may have ``(4 total / ratio - dense bytes) / W`` bytes.

        Raises:
            ConfigurationError: when not one pair fits.
        """
        dense_bytes = dense_nbytes(layout.dense, ranks, self._dtype)
        budget = int((4 * layout.total / ratio - dense_bytes) / ranks)
        fitting = range(1, layout.compressed // ranks + 1)  # the least shard

        def nbytes(pairs: int) -> int:
            codes = shard_codes(layout.compressed, ranks, pairs, self.buckets)
            return sum(codec.nbytes + wire.SEAL for _, codec in codes)

        count = bisect_right(fitting, budget, key=nbytes)
        if count < 1:
            header = dense_nbytes(0, ranks, self._dtype)
            raise unreachable(layout, ratio, dense_bytes - header, header + ranks * nbytes(1))
        return shard_codes(layout.compressed, ranks, count, self.buckets)

    def build(self, setting: Setting) -> Exchange:
        """A `ShardedExchange`."""
        return ShardedExchange(setting, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if self.half else torch.float32


def shard_codes(compressed: int, ranks: int, count: int, buckets: int) -> Codes:
    """Cut the vector, and so every shard, into at most so many parts; each has a code for its share of the pairs.

    A part is a range of coordinates that begins with one of the first rank's and has as many of every rank,
    the last part perhaps one less of some. Parts are no smaller than what makes a code's levels worth their bytes.
    """
    rows = -(-compressed // ranks)
    buckets = max(1, min(buckets, count // _LEAST_PAIRS))
    stops = [rows * number // buckets for number in range(buckets + 1)]
    parts = []
    for start, stop in pairwise(stops):
        where = slice(start * ranks, min(stop * ranks, compressed))
        share = count * stop // rows - count * start // rows
        parts.append((where, SparseCodec(stop - start, min(share, (where.stop - where.start) // ranks))))
    return parts


class ShardedExchange(SparseExchange):
    """Each coordinate has an owner, who receives, sums, selects again and tells everybody.

    Coordinate i belongs to rank ``i mod W``, so every owner gets a fair sample of all layers. With
    computed memory v_i on rank i, and ``Q`` the top-k with four-bit values::

        up     c_ij = Q(v_i on shard j)              alltoall;   v_i loses c_ij, for every j != i
        owner  s_j = v_j on shard j + sum_i c_ij     its own part needs no compression
        down   q_j = Q(s_j)                          allgather;  v_j on shard j becomes s_j - q_j
        update = (q_0 … q_{W-1}) / W

    What the way down leaves out is kept in the owner's own memory: that is the server's error of
    double compression (DoubleSqueeze, Tang et al. 2019) without a state of its own, so it
    survives `flush`, a checkpoint, and a change of the number of ranks. All ranks decode the same
    bytes, so the update is bit-identical by construction. Bytes do not grow with W:
    ``2 (W-1)/W k`` pairs of about 1.25 bytes, and an allreduce of the dense part.

    With several buckets every shard is cut into so many parts, each with its share of k, and a part is
    chosen, summed or applied while others are on the wire: up of every part, then down of every part.
    """

    @property
    def owned(self) -> slice:
        """This rank's shard."""
        return slice(self.comm.rank, self.layout.compressed, self.comm.size)

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(setting, dtype)
        self._parts: list[ShardedPart] = []
        self._parted: tuple[Codes, int, int] = ([], 0, 0)

    def send(self, plan: Codes, clip: Factor, finite: Finite) -> bool:
        """As for every `SparseExchange`, or with the header in the codes."""
        if not self._header_rides():
            return super().send(plan, clip, finite)
        header, each = self.rounds.header(_is_finite(finite), self.gradient.device), self.rounds.ranks_each
        self.memory.mark()
        if not wire.tells_of_odd(header):  # else something is sent that nobody will look at
            self.memory.absorb(self.gradient, clip)
        ups = self._start_ups(plan, wire.pack_header(header, each))
        with self.stats.phase("exchange"):
            told = wire.read_packed_headers(ups[0].wait()[:, -wire.header_bytes(each) :], each)
        goes_on = told.regular(self.comm.size) and not told.void
        if not goes_on:
            for up in ups:
                up.wait()
            self.memory.go_back()
        if not self.rounds.heed(told):
            return False
        if goes_on:
            self.hold(*self._bring_down(plan, ups))
        else:
            self.memory.absorb(self.gradient, clip)
            self.hold(*(self.send_chosen(plan) if self.rounds.all_present else self._send_whole()))
        return True

    def _header_rides(self) -> bool:
        """Whether it saves time, and costs no more bytes than by itself; alike on all ranks."""
        comm, layout, each = self.comm, self.layout, self.rounds.ranks_each
        if not (comm.sends_directly and self.rounds.regular and layout.dense == 0 and each <= wire.MOST_PACKED):
            return False
        by_itself = comm.allreduce_bytes(dense_nbytes(0, comm.size, torch.float16))
        cheap = (comm.size - 1) * wire.header_bytes(each) <= by_itself
        return cheap and 2.0 * comm.crossing >= _KEEPING * layout.total

    def send_chosen(self, plan: Codes) -> list[Part]:
        """Up of every part, then down of every part."""
        return self._bring_down(plan, self._start_ups(plan))

    def _start_ups(self, plan: Codes, header: Tensor | None = None) -> list[Pending]:
        if self._parted != (plan, self.comm.size, self.comm.rank):
            self._parted = plan, self.comm.size, self.comm.rank
            self._parts = [ShardedPart(self.memory.part(where), codec, self.comm) for where, codec in plan]
        headers = [header, *[None] * (len(plan) - 1)]
        ups = [self._start_up(number, *each) for number, each in enumerate(zip(self._parts, headers, strict=True))]
        self.stats.note_norms(*zip(*(part.norms for part in self._parts), strict=True))
        return ups

    def _bring_down(self, plan: Codes, ups: list[Pending]) -> list[Part]:
        downs = [self._start_down(number, *each) for number, each in enumerate(zip(self._parts, ups, strict=True))]
        wheres = [where for where, _ in plan]
        read = zip(wheres, self._parts, downs, strict=True)
        return [self._read(number, *each) for number, each in enumerate(read)]

    def _start_up(self, number: int, part: ShardedPart, header: Tensor | None) -> Pending:
        with self.stats.phase("select"):
            message = part.choose()
        if header is not None:
            message = torch.cat([message, header.expand(len(message), -1)], dim=1)
        with self.stats.phase("exchange"):
            pending = self.comm.start_alltoall(message, self.rounds.name_of(f"up{number}"))
        with self.stats.phase("memory"):
            part.give_away()
        return pending

    def _start_down(self, number: int, part: ShardedPart, up: Pending) -> Pending:
        name = self.rounds.name_of(f"up{number}")
        with self.stats.phase("exchange"):
            received = up.wait()[:, : part.nbytes]
        with self.stats.phase("select"):
            code = part.combine(received)
            self._look_at(part, name)
        with self.stats.phase("exchange"):
            pending = self.comm.start_allgather(code, self.rounds.name_of(f"down{number}"))
        with self.stats.phase("memory"):
            part.give_out()
        return pending

    def _read(self, number: int, where: slice, part: ShardedPart, down: Pending) -> Part:
        name = self.rounds.name_of(f"down{number}")
        with self.stats.phase("exchange"):
            gathered = down.wait()
        with self.stats.phase("memory"):
            rows, values = part.read(gathered)
            self._look_at(part, name)
            return Part(where, values.mul_(1.0 / self.divisor), Rows(self.comm.size, 0, rows))

    def _look_at(self, part: ShardedPart, name: str) -> None:
        """Note what a part has received otherwise than it was sent."""
        self.rounds.note_unsealed(part.intact, name)
        self.rounds.note_damage(~part.known, f"what came in {name} is no code")


class ShardedPart:
    """The arithmetic on one part of the vector, between its messages: in every step all of these, in this order.

    On a GPU what precedes a message is recorded, and so are its results written to again in the next step.

    Attributes:
        norms: of what `choose` chose, and of the part.
        intact, known: whether all that came last was as it was sent, and codes; of what was not, values are zero.
    """

    def __init__(self, memory: Memory, codec: SparseCodec, comm: Communicator) -> None:
        self._memory, self._codec, self._size, self._rank = memory, codec, comm.size, comm.rank
        device = memory.residual.device
        self._chosen = Recorded(self._choose, device)
        self._combined = Recorded(self._combine, device)
        self._decoded = Recorded(self._decode, device)

    @property
    def nbytes(self) -> int:
        """Of a sealed code."""
        return self._codec.nbytes + wire.SEAL

    def choose(self) -> Tensor:
        """Choose of every shard; the code for every owner, sealed."""
        self._rows, self._left, code, *norms = self._chosen()
        self.norms = (norms[0], norms[1])
        return code

    def give_away(self) -> None:
        """Lose what the other owners are sent."""
        for first, others in ((0, slice(self._rank)), (self._rank + 1, slice(self._rank + 1, None))):
            self._memory.keep(Rows(self._size, first, self._rows[others]), self._left[others], mask=True)

    def combine(self, received: Tensor) -> Tensor:
        """Sum what came for this rank's shard, and choose of it; the code for everybody, sealed."""
        self._rows, self._left, code, self.intact, self.known = self._combined(received)
        return code[0]

    def give_out(self) -> None:
        """Lose what everybody is sent."""
        self._memory.keep(Rows(self._size, self._rank, self._rows), self._left, mask=True)

    def read(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and values of every shard, the same on all ranks."""
        rows, values, self.intact, self.known = self._decoded(gathered)
        return rows, values

    def _choose(self) -> tuple[Tensor, ...]:
        residual = self._memory.residual
        rows, values = heaviest_of_shards(residual, self._size, self._codec.count)
        code, decoded = self._codec.encode(rows, values)
        norms = torch.linalg.vector_norm(values), torch.linalg.vector_norm(residual)
        return rows, values.sub_(decoded), wire.seal(code), *norms

    def _combine(self, received: Tensor) -> tuple[Tensor, ...]:
        residual, size, rank = self._memory.residual, self._size, self._rank
        rows, values, *flags = self._decode(received)
        for others in (slice(rank), slice(rank + 1, None)):
            add(residual, size, rank, rows[others], values[others])
        rows, values = heaviest_of_shards(residual[rank::size], 1, self._codec.count)
        code, decoded = self._codec.encode(rows, values)
        return rows, values.sub_(decoded), wire.seal(code), *flags

    def _decode(self, received: Tensor) -> tuple[Tensor, ...]:
        code, intact = wire.open_sealed(received)
        rows, values, known = self._codec.decode(code.mul_(intact.unsqueeze(1)))
        return rows, values.where(known.unsqueeze(1), 0.0), intact.all(), known.all()


def _is_finite(told: Finite) -> bool:
    """Waits for a device that is to tell."""
    return told if isinstance(told, bool) else not bool(told.isnan())
