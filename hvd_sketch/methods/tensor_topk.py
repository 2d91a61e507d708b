"""Top-k of every tensor by itself, each at a level of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressor import Sparsifier
from hvd_sketch.exchange.base import Exchange
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
            device=device,
        )

    def _ratios(self, tensors: int, step: int) -> list[float]:
        if isinstance(self.schedule, Accordion):
            return self.schedule.ratios
        return [self.ratio_at(step)] * tensors


class TensorTopKExchange(Exchange):
    """See `TensorTopK`; ``ratios`` maps the number of tensors and the step to one ratio a tensor."""

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        settings: str,
        ratios: Callable[[int, int], list[float]],
        *,
        average: bool,
        clip_norm: float | None,
        momentum: Momentum | None,
        device: torch.device,
    ) -> None:
        super().__init__(
            layout, comm, settings, average=average, clip_norm=clip_norm, momentum=momentum, device=device
        )
        self._ratios = ratios
        self._parts = [slice(slot.offset, slot.stop) for slot in layout.slots if slot.stop <= layout.compressed]

    def _is_dense_step(self) -> bool:
        return max(self._ratios(len(self._parts), self.step)) <= 1.0

    def _send_selected(self, clip: float, finite: bool) -> bool:
        dense = slice(self.layout.compressed, self.layout.total)
        message = self.gradient.new_empty(wire.HEADER + self.layout.dense)
        message[wire.HEADER :] = self.memory.computed(self.gradient, clip, dense)
        if not self._sum(message, finite, "dense"):
            return False
        with self.stats.phase("select"):
            self.memory.absorb(self.gradient, clip)
            chosen = self._choose()
            values = self.memory.residual[chosen]
            self.stats.note_captured(values, self.memory.residual[: self.layout.compressed])
        with self.stats.phase("exchange"):
            pairs = torch.cat([chosen.to(torch.int32), values.view(torch.int32)])
            gathered = self.comm.allgather(pairs, self._name("pairs")).view(self.comm.size, 2, -1)
        with self.stats.phase("memory"):
            self.memory.keep(dense, 0.0, mask=False)
            self.memory.keep(chosen, 0.0, mask=True)
            self.update[: self.layout.compressed].zero_()
            for indices, sent in gathered:
                self.update.index_add_(0, indices.long(), sent.contiguous().view(torch.float32))
            self.update[dense] = message[wire.HEADER :]
            self.update.mul_(1.0 / self._mean_divisor())
        return True

    def _choose(self) -> Tensor:
        magnitudes, chosen = self.memory.residual[: self.layout.compressed].abs(), []
        for part, ratio in zip(self._parts, self._ratios(len(self._parts), self.step), strict=True):
            k = max(1, int((part.stop - part.start) / (ratio * self.comm.size)))
            chosen.append(magnitudes[part].topk(k, sorted=False).indices.add_(part.start))
        return torch.cat(chosen)
