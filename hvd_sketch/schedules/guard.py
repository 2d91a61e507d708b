"""A guard: the ratio backs off when what is unsent grows beyond what error feedback can carry."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.saved import Form
from hvd_sketch.schedules.base import AdaptiveSchedule
from hvd_sketch.settings import given_numbers

_SMOOTHING = 0.8
_FORGETTING = 1.02
_RECOVERY = 2.0**0.25
_STATE = ("_ratio", "_ceiling", "_calm", "_normal", "_lowest", "_count")


class Guard(AdaptiveSchedule):
    """Holds the ratio, unless memory or gradients grow: then halves it until that ends, and says so.

    Every ``every`` steps, with the memories e_i and gradients g_i of all ranks::

        n <- 0.8 n + 0.2 sum_i |g_i|^2            b = sqrt(sum_i |e_i|^2 / n)
        l <- min(n, 1.02 l)                       q = sqrt(n / l)

    b, the backlog, is how many steps' gradients are unsent, by their norm; it settles at a number that
    depends on the ratio. q is how far the gradients have grown above the lowest they were of late:
    error feedback that diverges makes them grow, slowly and without end. When b is above
    ``backlog`` or q above ``growth``, the ratio is halved, down to 1, which sends everything; when
    both are below half of that, it recovers by a quarter of an octave, up to half of the ratio that
    failed. Rank 0 warns at every halving. Sent: two float64 every ``every`` steps.

    Args:
        ratio: to hold.
        backlog: the largest b, in steps.
        growth: the largest q, above 2.
        every: steps between two looks.

    Raises:
        ConfigurationError: for settings out of range.
    """

    @given_numbers
    def __init__(self, ratio: float, *, backlog: float = 100.0, growth: float = 3.0, every: int = 10) -> None:
        if not ratio > 1.0:
            raise ConfigurationError(f"Guard: ratio must be above 1, got {ratio}")
        if not backlog > 0.0 or not growth > 2.0 or every < 1:
            raise ConfigurationError(
                "Guard: backlog must be above 0, growth above 2 and every at least 1, "
                f"got {backlog}, {growth} and {every}"
            )
        self._target, self._backlog, self._growth, self._every = float(ratio), backlog, growth, every
        self._ratio = self._ceiling = self._target
        self._calm, self._count = True, 0
        self._normal = self._lowest = math.nan
        self.backlog = self.growth = math.nan
        """The latest b and q; NaN before the first look."""

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from now on; see `AdaptiveSchedule.attach`."""
        super().attach(exchange)
        exchange.follow_memory()
        exchange.agree_on(f"{type(self).__name__} {self._target} {self._backlog} {self._growth} {self._every}")

    def __call__(self, step: int) -> float:
        """The present ratio."""
        return self._ratio

    def observe(self, exchange: Exchange) -> None:
        """Look at the memory when it is time, and move the ratio."""
        self._count += 1
        if self._count < self._every:
            return
        self._count = 0
        norms = [
            torch.linalg.vector_norm(v, dtype=torch.float64) for v in (exchange.memory.residual, exchange.gradient)
        ]
        sums = torch.stack(norms).square().cpu()
        exchange.rounds.sum_values(sums, "guard")
        unsent, fresh = sums.tolist()
        if math.isnan(self._normal):
            self._normal = self._lowest = fresh
        self._normal = _SMOOTHING * self._normal + (1.0 - _SMOOTHING) * fresh
        self._lowest = min(self._normal, _FORGETTING * self._lowest)
        self.backlog, self.growth = _root(unsent, self._normal), _root(self._normal, self._lowest)
        self._move(max(self.backlog / self._backlog, self.growth / self._growth), exchange)

    def _move(self, alarm: float, exchange: Exchange) -> None:
        if alarm < 0.5:
            self._ratio, self._calm = min(self._ceiling, self._ratio * _RECOVERY), True
        elif alarm > 1.0 and self._ratio > 1.0:
            self._ratio = max(1.0, self._ratio / 2)
            self._ceiling, self._calm = self._ratio if self._calm else self._ceiling, False
            if exchange.comm.rank == 0:
                warnings.warn(
                    f"hvd_sketch: after step {exchange.step} {self.backlog:.0f} steps' gradients are unsent, and "
                    f"gradients are {self.growth:.1f} times their lowest norm of late; the ratio backs off to "
                    f"{self._ratio:g}. Lower the ratio or the learning rate, or use error_feedback=Anticipate()",
                    stacklevel=2,
                )

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {name: getattr(self, name) for name in _STATE}

    def state_form(self) -> Form:
        """The same kinds of numbers."""
        return {**dict.fromkeys(_STATE, float), "_calm": bool, "_count": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in _STATE:
            setattr(self, name, state[name])


def _root(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / denominator) if denominator > 0.0 else 1.0
