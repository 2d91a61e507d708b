"""Local top-k with allgather: the baseline that most sparsification papers use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.compressors.base import Sparsifier
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange, Part, Setting
from hvd_sketch.exchange.budget import unreachable
from hvd_sketch.exchange.sparse import SparseExchange, dense_nbytes
from hvd_sketch.gpu import Recorded
from hvd_sketch.layout import Layout
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.heaviest import heaviest
from hvd_sketch.sparse.rows import add

_PAIR_BYTES = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class TopK(Sparsifier):
    """Local top-k with allgather: every rank's own k largest coordinates; see `TopKExchange`.

    Its bytes grow with the number of ranks W, so at a given ratio k falls as 1/W.

    Attributes:
        half: the dense part travels as float16, on more than 128 ranks as float32; what is rounded off stays in
            the memory.
    """

    half: bool = True

    def fit(self, layout: Layout, ratio: float, ranks: int) -> int:
        """How many (index, value) pairs each rank may send.

        An allgather sends ``(W-1)`` times a rank's pairs where an allreduce sends ``2 (W-1)/W`` times
        its message, so at equal bytes k falls with the number of ranks W::

            k = (2 (4 total / ratio - dense bytes) / W - checksum bytes) / pair bytes

        Raises:
            ConfigurationError: when not one pair fits.
        """
        dense_bytes = dense_nbytes(layout.dense, ranks, self._dtype)
        k = int((2 * (4 * layout.total / ratio - dense_bytes) / ranks - wire.SEAL) / _PAIR_BYTES)
        if k < 1:
            header = dense_nbytes(0, ranks, self._dtype)
            raise unreachable(layout, ratio, dense_bytes - header, header + ranks * (_PAIR_BYTES + wire.SEAL) // 2)
        return min(k, layout.compressed)

    def build(self, setting: Setting) -> Exchange:
        """A `TopKExchange`."""
        return TopKExchange(setting, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if self.half else torch.float32


class TopKExchange(SparseExchange):
    """Each rank sends the k largest coordinates of its own memory, index and exact value.

    Sends the dense part in an allreduce, and k pairs of (int32, float32) in an allgather, whose
    bytes grow with the number of ranks. Needs fewer than 2^31 compressed coordinates. Source: Aji
    and Heafield, "Sparse Communication for Distributed Gradient Descent" (EMNLP 2017).
    """

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        if setting.layout.compressed >= 2**31:
            raise ConfigurationError(
                f"topk: indices are 32-bit, the model has {setting.layout.compressed} compressed coordinates; "
                "use sketch"
            )
        super().__init__(setting, dtype)
        self._planned: tuple[Any, int] = (None, 0)
        self._where = slice(0, self.layout.compressed)

    def choose(self, plan: Any) -> Tensor:
        """Which coordinates of the memory's compressed part to send (int64), as many on every rank."""
        return heaviest(self.memory.residual[self._where], plan)

    def send_chosen(self, plan: Any) -> list[Part]:
        """Allgather every rank's pairs, and sum them."""
        if self._planned != (plan, self.comm.size):
            self._planned = plan, self.comm.size
            self._paired = Recorded(partial(self._pair, plan), self.gradient.device)
            self._summed = Recorded(self._sum, self.gradient.device)
        with self.stats.phase("select"):
            chosen, pairs, sent = self._paired()
        with self.stats.phase("exchange"):
            pending = self.comm.start_allgather(wire.seal(pairs)[0], self.rounds.name_of("pairs"))
        with self.stats.phase("memory"):
            self.memory.keep(Chosen(chosen), 0.0, mask=True)
            self.stats.note_sent(sent, self.memory.residual[self._where])
        with self.stats.phase("exchange"):
            gathered = self.rounds.unseal(pending.wait(), self.rounds.name_of("pairs"))
        with self.stats.phase("memory"):
            update, known = self._summed(gathered)
            self.rounds.note_damage(~known, "pairs came that are not in order")
            return [Part(self._where, update, source=gathered)]

    def _pair(self, plan: Any) -> tuple[Tensor, ...]:
        """What is chosen, as coordinates and as pairs, and its norm."""
        chosen, residual = self.choose(plan), self.memory.residual[self._where]
        values = residual.index_select(0, chosen)
        pairs = torch.cat([chosen.to(torch.int32), values.view(torch.int32)]).view(torch.uint8).unsqueeze(0)
        return chosen, pairs, torch.linalg.vector_norm(values)

    def _sum(self, gathered: Tensor) -> tuple[Tensor, ...]:
        """The update, and whether all indices are ascending and in range; values of a rank whose are not are zero."""
        indices, values = gathered.view(torch.int32).view(self.comm.size, 2, -1).unbind(1)
        ascending = (indices[:, 1:] > indices[:, :-1]).all(1)
        known = ascending & (indices[:, 0] >= 0) & (indices[:, -1] < self.layout.compressed)
        anywhere = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
        indices = indices.where(known.unsqueeze(1), anywhere)
        update = self.update[self._where].zero_()
        add(update, 1, 0, indices.to(torch.int64), values.view(torch.float32).where(known.unsqueeze(1), 0.0))
        return update.mul_(1.0 / self.divisor), known.all()
