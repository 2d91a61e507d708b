"""Settings of local top-k with allgather."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressors.base import Sparsifier
from hvd_sketch.exchange import Exchange, TopKExchange
from hvd_sketch.exchange.plan import topk_plan
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


@dataclass(frozen=True, eq=False, kw_only=True)
class TopK(Sparsifier):
    """Local top-k with allgather: every rank's own k largest coordinates; see `TopKExchange`.

    Its bytes grow with the number of ranks W, so at a given ratio k falls as 1/W.

    Attributes:
        half: the dense part travels as float16; what rounding cuts off stays in the memory.
    """

    half: bool = True

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        if self.schedule is None:  # fail now, not at the end of the warm-up
            self._plan(layout, self.warmup_steps, comm.size)
        return TopKExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            dtype=torch.float16 if self.half else torch.float32,
            device=device,
        )

    def _plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        ratio = self.ratio_at(step)
        return (
            None if ratio <= 1.0 else topk_plan(layout, ratio, ranks, pair_bytes=8, lane_bytes=2 if self.half else 4)
        )
