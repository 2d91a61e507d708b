"""A random comb of coordinates, the same on all ranks: no indices, no selection, one allreduce."""

from __future__ import annotations

from typing import Protocol

import torch

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.comb import comb
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


class StridePlanner(Protocol):
    """Distance of the teeth, or None to send everything; equal on all ranks."""

    def __call__(self, layout: Layout, step: int) -> int | None: ...


class StrideExchange(Exchange):
    """Every R-th coordinate, from an offset drawn by (seed, step), which all ranks share.

    No coordinate waits longer than 2 R steps, see `comb`. Sends ``dense + compressed / R`` float32
    values in one allreduce. It ignores how heavy a coordinate is; its use is where a linear, shared
    pattern is asked for, as in CSER, whose globally randomised blocks it stands in for with teeth of
    one coordinate.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        settings: str,
        planner: StridePlanner,
        *,
        average: bool,
        seed: int,
        clip_norm: float | None,
        momentum: Momentum | None,
        device: torch.device,
    ) -> None:
        super().__init__(
            layout, comm, settings, average=average, clip_norm=clip_norm, momentum=momentum, device=device
        )
        self._planner, self._seed = planner, seed

    def _is_dense_step(self) -> bool:
        return self._planner(self.layout, self.step) is None

    def _send_selected(self, clip: float, finite: bool) -> bool:
        teeth, dense = self._teeth(), slice(self.layout.compressed, self.layout.total)
        values = self.memory.computed(self.gradient, clip, teeth)
        header = self.gradient.new_empty(wire.HEADER)
        message = torch.cat([header, self.memory.computed(self.gradient, clip, dense), values])
        if not self._sum(message, finite, "teeth"):
            return False
        with self.stats.phase("memory"):
            self.memory.absorb(self.gradient, clip)
            self.stats.note_captured(values, self.memory.residual[: self.layout.compressed])
            self.memory.keep(dense, 0.0, mask=False)
            self.memory.keep(teeth, 0.0, mask=True)
            self.update.zero_()
            self.update[dense] = message[wire.HEADER : wire.HEADER + self.layout.dense]
            self.update[teeth] = message[wire.HEADER + self.layout.dense :]
            self.update.mul_(1.0 / self._mean_divisor())
        return True

    def _teeth(self) -> slice:
        stride = self._planner(self.layout, self.step)
        assert stride is not None
        return comb(self.layout.compressed, stride, self.step, self._seed)
