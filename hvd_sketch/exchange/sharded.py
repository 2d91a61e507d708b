"""Two-way top-k over owners: compressed on the way up and on the way down, bytes constant in the ranks."""

from __future__ import annotations

from torch import Tensor

from hvd_sketch.codec import SparseCodec
from hvd_sketch.exchange.select import heaviest_of_shards
from hvd_sketch.exchange.sparse import SparseExchange
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
            residual, rank = self.memory.residual[: self.layout.compressed], self.comm.rank
            rows, values = heaviest_of_shards(residual, self.comm.size, codec.count)
            self.stats.note_captured(values, residual)
            code, decoded = codec.encode(rows, values)
            left = values.sub_(decoded)
            for first, others in ((0, slice(rank)), (rank + 1, slice(rank + 1, None))):
                self.memory.keep(Rows(self.comm.size, first, rows[others]), left[others], mask=True)
        with self.stats.phase("exchange"):
            return self.comm.alltoall(code, self._name("up"))

    def _send_down(self, received: Tensor, codec: SparseCodec) -> None:
        size, rank = self.comm.size, self.comm.rank
        with self.stats.phase("select"):
            rows, values = codec.decode(received)
            for others in (slice(rank), slice(rank + 1, None)):
                add(self.memory.residual, size, rank, rows[others], values[others])
            rows, values = heaviest_of_shards(self.memory.residual[self.owned], 1, codec.count)
            code, decoded = codec.encode(rows, values)
            self.memory.keep(Rows(size, rank, rows), values.sub_(decoded), mask=True)
        with self.stats.phase("exchange"):
            gathered = self.comm.allgather(code[0], self._name("down"))
        with self.stats.phase("memory"):
            rows, values = codec.decode(gathered)
            self.update[: self.layout.compressed].zero_()
            Rows(size, 0, rows).put(self.update, values.mul_(1.0 / self._mean_divisor()))
