"""Local top-k with allgather: the baseline that most sparsification papers use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.select import heaviest
from hvd_sketch.exchange.sparse import SparseExchange
from hvd_sketch.exchange.update import Part
from hvd_sketch.layout import Layout
from hvd_sketch.shards import add


class TopKExchange(SparseExchange):
    """Each rank sends the k largest coordinates of its own memory, index and exact value.

    Sends the dense part in an allreduce, and k pairs of (int32, float32) in an allgather, whose
    bytes grow with the number of ranks. Needs fewer than 2^31 compressed coordinates. Source: Aji
    and Heafield, "Sparse Communication for Distributed Gradient Descent" (EMNLP 2017).
    """

    def __init__(self, layout: Layout, comm: Communicator, *arguments: Any, **settings: Any) -> None:
        if layout.compressed >= 2**31:
            raise ConfigurationError(
                f"topk: indices are 32-bit, the model has {layout.compressed} compressed coordinates; use sketch"
            )
        super().__init__(layout, comm, *arguments, **settings)

    def _send_pairs(self, count: int) -> list[Part]:
        with self.stats.phase("select"):
            residual = self.memory.residual[: self.layout.compressed]
            chosen = self._choose(residual, count)
            values = residual.index_select(0, chosen)
            pairs = torch.cat([chosen.to(torch.int32), values.view(torch.int32)])
        with self.stats.phase("exchange"):
            pending = self.comm.start_allgather(pairs, self._name("pairs"))
        with self.stats.phase("memory"):
            self.stats.note_captured(values, residual)
            self.memory.keep(chosen, 0.0, mask=True)
        with self.stats.phase("exchange"):
            gathered = pending.wait()
        with self.stats.phase("memory"):
            indices, values = gathered.view(self.comm.size, 2, -1).unbind(1)
            where = slice(0, self.layout.compressed)
            update = self.update[where].zero_()
            add(update, 1, 0, indices.to(torch.int64), values.contiguous().view(torch.float32))
            return [Part(where, update.mul_(1.0 / self._mean_divisor()))]

    def _choose(self, residual: Tensor, count: int) -> Tensor:
        """Which ``count`` coordinates of the memory's compressed part to send."""
        return heaviest(residual, count)
