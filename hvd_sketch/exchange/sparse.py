"""What exchanges share that send the dense part in an allreduce and chosen coordinates beside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.update import Part
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


class PairPlanner(Protocol):
    """Coordinates to send in one message of a step, or None to send everything; equal on all ranks."""

    def __call__(self, layout: Layout, step: int, ranks: int) -> int | None: ...


class SparseExchange(Exchange):
    """First the dense part: an allreduce of ``dense + 4`` values; then what a subclass sends of the others.

    In half precision the values carry a power-of-two scale that follows from the last sum, so all
    ranks know it; the first sum is in float32. What rounding cut off stays in the memory.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        settings: str,
        planner: PairPlanner,
        *,
        average: bool,
        clip_norm: float | None,
        momentum: Momentum | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(
            layout, comm, settings, average=average, clip_norm=clip_norm, momentum=momentum, device=device
        )
        self._planner, self._dtype = planner, dtype
        self._dense_scale: float | None = None  # until a sum other than zero was seen, messages are float32
        self._dense = slice(layout.compressed, layout.total)

    @abstractmethod
    def _send_pairs(self, count: int) -> list[Part]:
        """Send ``count`` coordinates of the memory, which has the step's gradient; the compressed part's update."""

    def _is_dense_step(self) -> bool:
        return self._planner(self.layout, self.step, self.comm.size) is None

    def _send_selected(self, clip: float, finite: bool) -> bool:
        count = self._planner(self.layout, self.step, self.comm.size)
        assert count is not None
        summed = self._sum_dense(clip, finite)
        if summed is None:
            return False
        self._update.hold(*self._send_pairs(count), Part(self._dense, summed.mul_(1.0 / self._mean_divisor())))
        return True

    def _sum_dense(self, clip: float, finite: bool) -> Tensor | None:
        """Sum the dense part, and take the gradient into the memory; None, and nothing done, when `_sum` says so."""
        ranks, scale = self.comm.size, self._dense_scale or 1.0
        dtype = self._dtype if self._dense_scale else torch.float32
        message = torch.empty(wire.HEADER + self.layout.dense, dtype=dtype, device=self.gradient.device)
        lanes, computed = message[wire.HEADER :], self.memory.computed(self.gradient, clip, self._dense)
        wire.pack(lanes, computed.clone(), scale, ranks)
        left = computed - wire.unpack(lanes, scale, torch.empty_like(computed))
        if not self._sum(message, finite, "dense"):
            return None
        self.memory.absorb(self.gradient, clip)
        self.memory.keep(self._dense, left, mask=False)
        summed = wire.unpack(lanes, scale, computed)
        if self._all_present:
            largest = float(torch.linalg.vector_norm(summed, ord=torch.inf)) / ranks if summed.numel() else 0.0
            self._dense_scale = wire.shared_scale(largest, ranks, self._dtype) if largest > 0.0 else None
        return summed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._dense_scale = state["dense_scale"]

    def _extra_state(self) -> dict[str, Any]:
        return {"dense_scale": self._dense_scale}
