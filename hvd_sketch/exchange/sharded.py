"""Two-way top-k over owners: compressed on the way up and on the way down, bytes constant in the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_sketch.codec import SparseCodec
from hvd_sketch.comm.base import Pending
from hvd_sketch.exchange.plan import shard_codes
from hvd_sketch.exchange.select import heaviest_of_shards
from hvd_sketch.exchange.sparse import SparseExchange
from hvd_sketch.exchange.update import Part
from hvd_sketch.shards import Rows, add


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
    ``2 (W-1)/W k`` pairs of about 1.25 bytes, and an allreduce of the dense part. Cannot be
    combined with ``hvd.join``.

    With several buckets every shard is cut into so many parts, each with its share of k, and a part is
    chosen, summed or applied while others are on the wire: up of every part, then down of every part.
    """

    def __init__(self, *arguments: Any, buckets: int = 1, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._buckets = buckets

    @property
    def owned(self) -> slice:
        """This rank's shard."""
        return slice(self.comm.rank, self.layout.compressed, self.comm.size)

    def _send_pairs(self, count: int) -> list[Part]:
        parts = shard_codes(self.layout.compressed, self.comm.size, count, self._buckets)
        ups, norms = zip(*(self._start_up(number, *part) for number, part in enumerate(parts)), strict=True)
        self.stats.note_captured(*torch.stack(norms).unbind(1))
        downs = [self._start_down(number, up, *part) for number, (up, part) in enumerate(zip(ups, parts, strict=True))]
        return [self._read(down, *part) for down, part in zip(downs, parts, strict=True)]

    def _start_up(self, number: int, where: slice, codec: SparseCodec) -> tuple[Pending, Tensor]:
        """Choose of every shard's part, send the owners theirs, and keep the rest; norms of choice and part."""
        size, rank, memory = self.comm.size, self.comm.rank, self.memory.part(where)
        with self.stats.phase("select"):
            rows, values = heaviest_of_shards(memory.residual, size, codec.count)
            code, decoded = codec.encode(rows, values)
        with self.stats.phase("exchange"):
            pending = self.comm.start_alltoall(code, self._name(f"up{number}"))
        with self.stats.phase("memory"):
            norms = torch.stack([torch.linalg.vector_norm(values), torch.linalg.vector_norm(memory.residual)])
            left = values.sub_(decoded)
            for first, others in ((0, slice(rank)), (rank + 1, slice(rank + 1, None))):
                memory.keep(Rows(size, first, rows[others]), left[others], mask=True)
        return pending, norms

    def _start_down(self, number: int, up: Pending, where: slice, codec: SparseCodec) -> Pending:
        """Sum what came for a part of this rank's shard, choose again, tell everybody, and keep the rest."""
        size, rank, memory = self.comm.size, self.comm.rank, self.memory.part(where)
        with self.stats.phase("exchange"):
            received = up.wait()
        with self.stats.phase("select"):
            rows, values = codec.decode(received)
            for others in (slice(rank), slice(rank + 1, None)):
                add(memory.residual, size, rank, rows[others], values[others])
            rows, values = heaviest_of_shards(memory.residual[rank::size], 1, codec.count)
            code, decoded = codec.encode(rows, values)
        with self.stats.phase("exchange"):
            pending = self.comm.start_allgather(code[0], self._name(f"down{number}"))
        with self.stats.phase("memory"):
            memory.keep(Rows(size, rank, rows), values.sub_(decoded), mask=True)
        return pending

    def _read(self, down: Pending, where: slice, codec: SparseCodec) -> Part:
        """The update of a part."""
        with self.stats.phase("exchange"):
            gathered = down.wait()
        with self.stats.phase("memory"):
            rows, values = codec.decode(gathered)
            return Part(where, values.mul_(1.0 / self._mean_divisor()), Rows(self.comm.size, 0, rows))
