"""Two-way top-k over owners: compressed on the way up and on the way down, bytes constant in the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.codec import SparseCodec
from hvd_sketch.exchange.select import heaviest
from hvd_sketch.exchange.sparse import SparseExchange


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
    """

    @property
    def owned(self) -> slice:
        """This rank's shard."""
        return slice(self.comm.rank, self.layout.compressed, self.comm.size)

    def _send_pairs(self, count: int) -> None:
        codec = SparseCodec(-(-self.layout.compressed // self.comm.size), count)
        self._send_down(self._send_up(codec), codec)

    def _send_up(self, codec: SparseCodec) -> Tensor:
        with self.stats.phase("select"):
            rows, values = _heaviest([self._shard(owner) for owner in range(self.comm.size)], codec.count)
            self.stats.note_captured(values, self.memory.residual[: self.layout.compressed])
            code, decoded = codec.encode(rows, values)
            others = torch.arange(self.comm.size, device=rows.device) != self.comm.rank
            where, left = self._coordinates(rows)[others], (values - decoded)[others]
            self.memory.keep(where.flatten(), left.flatten(), mask=True)
        with self.stats.phase("exchange"):
            return self.comm.alltoall(code, self._name("up"))

    def _send_down(self, received: Tensor, codec: SparseCodec) -> None:
        with self.stats.phase("select"):
            own = self._shard(self.comm.rank)
            total = own.clone(memory_format=torch.contiguous_format)
            rows, values = codec.decode(received)
            for sender in range(self.comm.size):
                if sender != self.comm.rank:
                    total.index_add_(0, rows[sender], values[sender])
            rows, values = _heaviest([total], codec.count)
            code, decoded = codec.encode(rows, values)
            own.copy_(total)
            sent = rows[0] * self.comm.size + self.comm.rank
            self.memory.keep(sent, (values - decoded)[0], mask=True)
        with self.stats.phase("exchange"):
            gathered = self.comm.allgather(code[0], self._name("down"))
        with self.stats.phase("memory"):
            rows, values = codec.decode(gathered)
            self.update[: self.layout.compressed].zero_()
            self.update.index_copy_(0, self._coordinates(rows).flatten(), values.flatten())

    def _shard(self, owner: int) -> Tensor:
        """The memory of what a rank owns: a view."""
        return self.memory.residual[owner : self.layout.compressed : self.comm.size]

    def _coordinates(self, rows: Tensor) -> Tensor:
        """Where in the vector the rows of every owner's shard are, ``(ranks, count)``."""
        return rows * self.comm.size + torch.arange(self.comm.size, device=rows.device).unsqueeze(1)


def _heaviest(shards: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Indices (ascending) and values of the ``count`` largest magnitudes of each."""
    rows = [heaviest(shard, count) for shard in shards]
    return torch.stack(rows), torch.stack([shard[chosen] for shard, chosen in zip(shards, rows, strict=True)])
