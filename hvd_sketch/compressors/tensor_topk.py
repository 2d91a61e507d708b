"""Top-k of every tensor by itself, each at a level of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch.compressors.base import Sparsifier
from hvd_sketch.compressors.topk import TopKExchange
from hvd_sketch.exchange import Exchange, Setting
from hvd_sketch.layout import Layout
from hvd_sketch.schedules.accordion import Accordion
from hvd_sketch.sparse.heaviest import heaviest


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

    @property
    def wants_whole_tensors(self) -> bool:
        """It chooses by tensor."""
        return True

    def plan(self, layout: Layout, step: int, ranks: int) -> list[int] | None:
        """k of every tensor that is not sent whole, in the layout's order."""
        if not isinstance(self.schedule, Accordion):
            counts: list[int] | None = super().plan(layout, step, ranks)
            return counts
        ratios = self.schedule.ratios
        return None if max(ratios) <= 1.0 else _counts(layout, ratios, ranks)

    def fit(self, layout: Layout, ratio: float, ranks: int) -> list[int]:
        """The same ratio for every tensor."""
        return _counts(layout, [ratio] * len(_tensors(layout)), ranks)

    def build(self, setting: Setting) -> Exchange:
        """A `TensorTopKExchange`."""
        return TensorTopKExchange(setting)


class TensorTopKExchange(TopKExchange):
    """See `TensorTopK`."""

    def choose(self, plan: list[int]) -> Tensor:
        """The heaviest ``plan[l]`` coordinates of every tensor l."""
        parts, residual = _tensors(self.layout), self.memory.residual
        chosen = [heaviest(residual[part], k).add_(part.start) for part, k in zip(parts, plan, strict=True)]
        return torch.cat(chosen)


def _counts(layout: Layout, ratios: list[float], ranks: int) -> list[int]:
    sizes = [part.stop - part.start for part in _tensors(layout)]
    return [max(1, int(size / (ratio * ranks))) for size, ratio in zip(sizes, ratios, strict=True)]


def _tensors(layout: Layout) -> list[slice]:
    return [slice(slot.offset, slot.stop) for slot in layout.slots if slot.offset < layout.compressed]
