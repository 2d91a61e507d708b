"""What comes into a step: this rank's gradients, as they become ready, and what they measure together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from hvd_sketch.exchange.domain import Domain
from hvd_sketch.exchange.progress import Progress
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.exchange.staging import Staging

Factor = float | Tensor
Finite = bool | Tensor


class Intake(Progress):
    """The part of an `hvd_sketch.exchange.base.Exchange` that gradients are handed to; nothing is sent here.

    Attributes:
        domain: the coordinates of gradient, memory and messages.
        staging: which gradients have arrived, and their norms.
        gradient: the step's gradients, float32, of the layout's size.
        whole_norm: the norm of a gradient from that of this rank's shards of it; None where a rank has all of it.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.domain = Domain(setting.layout, setting.mixing)
        self.staging = Staging(setting.layout, setting.device, self.domain)
        self.gradient = self.staging.vector
        self.whole_norm: Callable[[float], float] | None = None

    def submit(
        self,
        position: int,
        gradient: Tensor,
        factor: float = 1.0,
        parameter: Tensor | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """Hand in ``factor * gradient + weight_decay * parameter`` (dense) of slot ``position``."""
        self.staging.put(position, gradient, factor, parameter, weight_decay)

    def submit_many(self, gradients: Mapping[int, Tensor], factor: float = 1.0) -> None:
        """Hand in ``factor`` times the gradients of some slots, by their positions, at the cost of one on a GPU."""
        self.staging.put_many(gradients, factor)

    def submit_all(self, vector: Tensor) -> None:
        """Hand in the whole vector, in the layout's order, in place of one `submit` a slot."""
        self.staging.put_all(vector)

    @property
    def streams(self) -> bool:
        """Whether gradients are better handed in as they become ready, because messages begin before `run`."""
        return False

    def has_begun(self, position: int) -> bool:
        """Whether some of a slot's gradient is under way."""
        return False

    def take_back(self, position: int) -> None:
        """Undo a `submit` of this step, of a slot that has not begun."""
        self.staging.take_back(position)

    def measure(self) -> tuple[Factor, Finite]:
        """The factor of this rank's gradient, and whether it is finite; what a GPU knows stays there."""
        if self.staging.gathered and self.whole_norm is None:
            return self.staging.measure(self._setting.clip_norm)
        return self.judge(self.gradient_norm())

    def judge(self, norm: float) -> tuple[float, bool]:
        """The factor of a gradient, and whether it is finite, by the norm of what this rank has of it."""
        whole = norm if self.whole_norm is None else self.whole_norm(norm)
        return self.clip_factor(whole), math.isfinite(whole)

    def gradient_norm(self) -> float:
        """The norm of this rank's gradient; not finite if the gradient is not."""
        return self.staging.norm()

    def clip_factor(self, norm: float) -> float:
        """The factor that brings a gradient of this norm down to ``clip_norm``."""
        limit = self._setting.clip_norm
        if limit is None or not math.isfinite(norm) or norm == 0.0:
            return 1.0
        return min(1.0, limit / norm)

    def in_model(self, vector: Tensor) -> Tensor:
        """Gradient or memory in the coordinates of the model: the vector itself, where those are the exchange's."""
        return vector if self.domain.is_models else self.domain.leave(vector.clone())
