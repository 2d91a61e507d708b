"""A smooth controller: the ratio that captures a wanted share of the memory's energy."""

from __future__ import annotations

import math
from typing import Any

import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.saved import Form
from hvd_sketch.schedules.base import AdaptiveSchedule
from hvd_sketch.settings import given_numbers


class EnergyTarget(AdaptiveSchedule):
    """Holds the share of the memory's energy that a step sends near a target, by moving the ratio.

    Every ``every`` steps, with E the mean captured energy of these steps over all ranks::

        ratio <- ratio * clamp((E / target) ** gain, 1/2, 2)      within low … high

    rounded down to a quarter power of two, so that buffers are seldom made anew. It starts at
    ``low``. Sent: two float64 every ``every`` steps.

    Args:
        target: the share to hold, between 0 and 1.
        low, high: bounds of the ratio, 1 <= low <= high.
        every: steps between two decisions.
        gain: how hard to react; the share falls about as the ratio grows, so 1 is the whole way.

    Raises:
        ConfigurationError: for settings out of range; in a step, when the exchange does not tell
            its captured energy.
    """

    @given_numbers
    def __init__(
        self, target: float, *, low: float = 2.0, high: float = 200.0, every: int = 10, gain: float = 0.5
    ) -> None:
        if not 0.0 < target < 1.0:
            raise ConfigurationError(f"EnergyTarget: target must be between 0 and 1, got {target}")
        if not 1.0 <= low <= high:
            raise ConfigurationError(f"EnergyTarget: ratios must be 1 <= low <= high, got {low} and {high}")
        if every < 1 or not 0.0 < gain <= 1.0:
            raise ConfigurationError(
                f"EnergyTarget: every must be at least 1 and gain in (0, 1], got {every} and {gain}"
            )
        self._target, self._low, self._high, self._every, self._gain = target, low, high, every, gain
        self._ratio = float(low)
        self._captured, self._known, self._count = 0.0, 0, 0

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from now on; see `AdaptiveSchedule.attach`."""
        super().attach(exchange)
        exchange.agree_on(f"{type(self).__name__} {self._target} {self._low} {self._high} {self._every} {self._gain}")

    def __call__(self, step: int) -> float:
        """The present ratio, on the grid of quarter powers of two."""
        return min(max(_grid(self._ratio), self._low), self._high)

    def observe(self, exchange: Exchange) -> None:
        """Add the step's captured energy up, and move the ratio when it is time."""
        energy = exchange.stats.captured_energy
        if not math.isnan(energy):
            self._captured += energy
            self._known += 1
        self._count += 1
        if self._count < self._every:
            return
        sums = torch.tensor([self._captured, self._known], dtype=torch.float64, device="cpu")
        exchange.rounds.sum_values(sums, "energy")
        captured, known = sums.tolist()
        if not known:
            raise ConfigurationError(
                "EnergyTarget needs an exchange that tells its captured energy; use sketch, topk or sharded"
            )
        factor = min(max((captured / known / self._target) ** self._gain, 0.5), 2.0)
        self._ratio = min(max(self._ratio * factor, self._low), self._high)
        self._captured, self._known, self._count = 0.0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {"ratio": self._ratio, "captured": self._captured, "known": self._known, "count": self._count}

    def state_form(self) -> Form:
        """The same kinds of numbers."""
        return {"ratio": float, "captured": float, "known": int, "count": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._ratio, self._count = state["ratio"], state["count"]
        self._captured, self._known = state["captured"], state["known"]


def _grid(ratio: float) -> float:
    return float(2.0 ** (math.floor(4.0 * math.log2(ratio)) / 4.0))
