"""Settings of the random comb."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressors.base import Sparsifier
from hvd_sketch.exchange import Exchange, StrideExchange
from hvd_sketch.exchange.plan import stride_plan
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


@dataclass(frozen=True, eq=False, kw_only=True)
class Stride(Sparsifier):
    """A random comb of coordinates, the same on all ranks; see `StrideExchange`.

    Attributes:
        seed: of the offsets; equal on all ranks.
    """

    seed: int = 0

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        if self.schedule is None:  # fail now, not at the end of the warm-up
            self._plan(layout, self.warmup_steps)
        return StrideExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            seed=self.seed,
            clip_norm=self.clip_norm,
            momentum=momentum,
            device=device,
        )

    def _plan(self, layout: Layout, step: int) -> int | None:
        ratio = self.ratio_at(step)
        return None if ratio <= 1.0 else stride_plan(layout, ratio)
