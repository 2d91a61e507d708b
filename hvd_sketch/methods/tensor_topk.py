"""Top-k of every tensor by itself, each at a level of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressors import Sparsifier
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.select import heaviest
from hvd_sketch.exchange.topk import TopKExchange
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum
from hvd_sketch.methods.accordion import Accordion


@dataclass(frozen=True, eq=False, kw_only=True)
class TensorTopK(Sparsifier):
    """Each rank sends the k_l largest coordinates of its own memory of every tensor l.

    With W ranks, n_l elements, and the ratio r_l that an `Accordion` schedule has for the tensor,
    or else the one ratio of the step for all::

        k_l = max(1, floor(n_l / (r_l W)))

    Sends the dense part in an allreduce of ``dense + 4`` floats, and ``sum_l k_l`` pairs of (int32,
    float32) in an allgather: ``1 / r_l`` of what the tensor costs in a dense allreduce. When no ratio
    is above 1, everything travels in one. The tensors are those that are not sent whole anyway.
    Source: the top-k of Agarwal et al., "Accordion" (MLSys 2021), with error feedback.
    """

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        return TensorTopKExchange(
            layout,
            comm,
            repr(self),
            self._ratios,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            dtype=torch.float32,
            device=device,
        )

    def _ratios(self, tensors: int, step: int) -> list[float]:
        if isinstance(self.schedule, Accordion):
            return self.schedule.ratios
        return [self.ratio_at(step)] * tensors


class TensorTopKExchange(TopKExchange):
    """See `TensorTopK`; ``ratios`` maps the number of tensors and the step to one ratio a tensor."""

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        settings: str,
        ratios: Callable[[int, int], list[float]],
        **others: Any,
    ) -> None:
        super().__init__(layout, comm, settings, self._pairs, **others)
        self._ratios = ratios
        self._parts = [slice(slot.offset, slot.stop) for slot in layout.slots if slot.stop <= layout.compressed]

    def _pairs(self, layout: Layout, step: int, ranks: int) -> int | None:
        ratios = self._ratios(len(self._parts), step)
        return None if max(ratios) <= 1.0 else sum(self._counts(ratios))

    def _counts(self, ratios: list[float]) -> list[int]:
        return [
            max(1, int((part.stop - part.start) / (ratio * self.comm.size)))
            for part, ratio in zip(self._parts, ratios, strict=True)
        ]

    def _choose(self, residual: Tensor, count: int) -> Tensor:
        counts = self._counts(self._ratios(len(self._parts), self.step))
        chosen = zip(self._parts, counts, strict=True)
        return torch.cat([heaviest(residual[part], k).add_(part.start) for part, k in chosen])
