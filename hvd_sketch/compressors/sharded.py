"""Settings of the two-way top-k over owners."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressors.base import Bucketed
from hvd_sketch.exchange import Exchange, ShardedExchange
from hvd_sketch.exchange.plan import sharded_plan
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded(Bucketed):
    """Two-way top-k over owners: compressed up and down, four-bit values; see `ShardedExchange`.

    Its bytes do not grow with the number of ranks, and every rank gets its own heavy coordinates
    through to their owner, where they are summed before the second selection.

    Attributes:
        dense_below: 0, so that 1-D tensors are compressed like the others: on small models they would
            take a large part of the bytes.
        half: the dense part travels as float16; what rounding cuts off stays in the memory.
    """

    dense_below: int = 0
    half: bool = True

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        if self.schedule is None:  # fail now, not at the end of the warm-up
            self._plan(layout, self.warmup_steps, comm.size)
        return ShardedExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            dtype=torch.float16 if self.half else torch.float32,
            device=device,
            buckets=self.buckets,
        )

    def _plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        ratio, lane_bytes = self.ratio_at(step), 2 if self.half else 4
        if ratio <= 1.0:
            return None
        return sharded_plan(layout, ratio, ranks, lane_bytes=lane_bytes, buckets=self.buckets)
