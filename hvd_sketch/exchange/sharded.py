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
    computed memory v_i on rank i, and ``Q`` the top-k with eight-bit values::

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
        shards = self._by_owner(codec.universe)
        received = self._send_up(shards, codec)
        self._send_down(shards, received, codec)

    def _by_owner(self, universe: int) -> Tensor:
        """The memory as ``(universe, ranks)``, column j the shard of rank j; zeros at the end."""
        padded = torch.zeros(universe * self.comm.size, dtype=torch.float32, device=self.gradient.device)
        padded[: self.layout.compressed] = self.memory.residual[: self.layout.compressed]
        return padded.view(universe, self.comm.size)

    def _send_up(self, shards: Tensor, codec: SparseCodec) -> Tensor:
        with self.stats.phase("select"):
            rows, values = _heaviest(shards.t().contiguous(), codec.count)
            self.stats.note_captured(values, shards)
            code, decoded = codec.encode(rows, values)
            others = torch.arange(self.comm.size, device=rows.device) != self.comm.rank
            owners = torch.arange(self.comm.size, device=rows.device).unsqueeze(1).expand_as(rows)
            where = (rows * self.comm.size + owners)[others]
            self._keep(where, (values - decoded)[others])
        with self.stats.phase("exchange"):
            return self.comm.alltoall(code, self._name("up"))

    def _send_down(self, shards: Tensor, received: Tensor, codec: SparseCodec) -> None:
        ranks, rank = self.comm.size, self.comm.rank
        with self.stats.phase("select"):
            total = shards[:, rank].clone()
            rows, values = codec.decode(received)
            for sender in range(ranks):
                if sender != rank:
                    total.index_add_(0, rows[sender], values[sender])
            rows, values = _heaviest(total.unsqueeze(0), codec.count)
            code, decoded = codec.encode(rows, values)
            total[rows[0]] -= decoded[0]
            own = torch.arange(rank, self.layout.compressed, ranks, device=rows.device)
            self.memory.residual[own] = total[: own.numel()]
            inside = rows[0] * ranks + rank
            inside = inside[inside < self.layout.compressed]
            self.memory.keep(inside, self.memory.residual[inside], mask=True)
        with self.stats.phase("exchange"):
            gathered = self.comm.allgather(code[0], self._name("down"))
        with self.stats.phase("memory"):
            rows, values = codec.decode(gathered)
            where = rows * ranks + torch.arange(ranks, device=rows.device).unsqueeze(1)
            valid = where < self.layout.compressed
            self.update[: self.layout.compressed].zero_()
            self.update[where[valid]] = values[valid]

    def _keep(self, where: Tensor, left: Tensor) -> None:
        valid = where < self.layout.compressed
        self.memory.keep(where[valid], left[valid], mask=True)


def _heaviest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices (ascending) and values of the ``count`` largest magnitudes of each row."""
    indices = torch.stack([heaviest(row, count) for row in rows])
    return indices, rows.gather(1, indices)
