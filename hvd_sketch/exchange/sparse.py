"""What exchanges share that send the dense part in an allreduce and chosen coordinates beside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.exchange.base import Exchange, Factor, Finite
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.exchange.update import Part
from hvd_sketch.gpu import Late


class SparseExchange(Exchange):
    """First the dense part: an allreduce of ``dense + 4`` values; then what a subclass sends of the others.

    In half precision the values carry a power-of-two scale that follows from the last sum, so all
    ranks know it; the first sum is in float32. What rounding cut off stays in the memory.

    Args:
        setting: as for every exchange.
        dtype: of the dense values on the wire, float32 or float16.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(setting)
        self._dtype = dtype
        self._scale: float | None = None  # until a sum other than zero was seen, messages are float32
        self._seen: tuple[Late, int] | None = None
        self._dense = slice(self.layout.compressed, self.layout.total)

    @abstractmethod
    def send_chosen(self, plan: Any) -> list[Part]:
        """Send coordinates of the memory, which has the step's gradient, and keep the rest.

        Returns:
            the update of the compressed part, the same on all ranks.
        """

    def send(self, plan: Any, clip: Factor, finite: Finite) -> bool:
        """The dense part, then the chosen coordinates."""
        summed = self._sum_dense(clip, finite)
        if summed is None:
            return False
        self.hold(*self.send_chosen(plan), Part(self._dense, summed.mul_(1.0 / self.divisor)))
        return True

    def _sum_dense(self, clip: Factor, finite: Finite) -> Tensor | None:
        """Sum the dense part, and take the gradient into the memory; None, and nothing done, when a rank says so."""
        ranks, scale = self.comm.size, self._dense_scale or 1.0
        dtype = self._dtype if self._dense_scale else torch.float32
        message = torch.empty(wire.HEADER + self.layout.dense, dtype=dtype, device=self.gradient.device)
        lanes, computed = message[wire.HEADER :], self.memory.computed(self.gradient, clip, self._dense)
        wire.pack(lanes, computed.clone(), scale, ranks)
        left = computed - wire.unpack(lanes, scale, torch.empty_like(computed))
        if not self.rounds.sum(message, finite, "dense"):
            return None
        self.memory.absorb(self.gradient, clip)
        self.memory.keep(self._dense, left, mask=False)
        summed = wire.unpack(lanes, scale, computed)
        if self.rounds.all_present and summed.numel():
            self._seen = Late(torch.linalg.vector_norm(summed, ord=torch.inf)), ranks
        return summed

    @property
    def _dense_scale(self) -> float | None:
        """That of the coming message, from the last sum that all ranks know; read when it is needed."""
        if self._seen is not None:
            (late, ranks), self._seen = self._seen, None
            largest = late.read()[0] / ranks
            self._scale = wire.shared_scale(largest, ranks, self._dtype) if largest > 0.0 else None
        return self._scale

    def own_state(self) -> dict[str, Any]:
        """The scale of the dense values."""
        return {"dense_scale": self._dense_scale}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._scale, self._seen = state["dense_scale"], None
