"""Accordion: compress little while the gradient changes fast, and much otherwise; and a smooth controller."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.layout import Layout
from hvd_sketch.schedule import AdaptiveSchedule


class CriticalRegimes(AdaptiveSchedule):
    """Which parts of the gradient are in a critical regime.

    With A the sum of a rank's raw gradients over an epoch, and every P epochs, for each part::

        D = sqrt(sum_i ||A_i||^2)            critical  <=>  |D_last - D| >= threshold * D_last

    Critical as well: everything before the first two detections, and everything from a decrease
    of the learning rate until the next detection. The sums of squares are reduced over the ranks,
    so all of them decide alike (the authors decide by rank 0's gradient alone).

    State: one vector of the model's size. Sent: a float64 a part, every P epochs.
    Source: Agarwal et al., "Accordion" (MLSys 2021), arXiv 2010.16248.

    Args:
        epoch_steps: steps of an epoch.
        every: P, in epochs.
        threshold: the relative change from which on a regime is critical.
        learning_rate: reads the present learning rate, equal on all ranks, as in
            ``lambda: optimizer.param_groups[0]["lr"]``; None ignores it, as one should where it
            falls in every step.

    Raises:
        ConfigurationError: for settings out of range.
    """

    def __init__(
        self,
        epoch_steps: int,
        *,
        every: int = 10,
        threshold: float = 0.5,
        learning_rate: Callable[[], float] | None = None,
    ) -> None:
        name = type(self).__name__
        if epoch_steps < 1 or every < 1:
            raise ConfigurationError(
                f"{name}: epoch_steps and every must be at least 1, got {epoch_steps} and {every}"
            )
        if not threshold > 0.0:
            raise ConfigurationError(f"{name}: threshold must be above 0, got {threshold}")
        self._epoch_passes, self._every, self._threshold = epoch_steps, every, threshold
        self._learning_rate = learning_rate
        self._settings = f"{name} {epoch_steps} {every} {threshold}"
        self._passes, self._passes_of_step = 0, 1
        self._skipped = 0
        self._rate: float | None = None
        self.critical: list[bool] = []
        self._last: list[float] | None = None
        self._sum = torch.empty(0)
        self._parts: list[slice] = []

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from now on; see `AdaptiveSchedule.attach`."""
        super().attach(exchange)
        exchange.agree_on(self._settings)
        self._parts = self._parts_of(exchange.layout)
        self.critical = [True] * len(self._parts)
        self._sum = torch.zeros_like(exchange.gradient)

    def observe(self, exchange: Exchange) -> None:
        """Add the step's gradient up; at the end of every P-th epoch, decide; then look at the learning rate."""
        self._add_up(exchange)
        self._watch_learning_rate()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only."""
        return {
            "passes": self._passes,
            "rate": self._rate,
            "critical": list(self.critical),
            "last": self._last,
            "sum": self._sum.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._passes, self._rate, self._last = state["passes"], state["rate"], state["last"]
        self.critical = list(state["critical"])
        self._sum.copy_(state["sum"])

    @abstractmethod
    def _parts_of(self, layout: Layout) -> list[slice]:
        """The parts of the vector that are judged, each by itself."""

    def _relax(self, critical: list[bool]) -> None:
        """Take over the detector's answer for each part."""
        self.critical = critical

    def _add_up(self, exchange: Exchange) -> None:
        epoch, skipped = self._passes // self._epoch_passes, exchange.stats.skipped > self._skipped
        self._passes, self._skipped = self._passes + self._passes_of_step, exchange.stats.skipped
        if epoch % self._every != 0:
            return
        if not skipped:
            self._sum.add_(exchange.gradient)
        if self._passes // self._epoch_passes > epoch:
            self._decide(exchange)
            self._sum.zero_()

    def _watch_learning_rate(self) -> None:
        if self._learning_rate is None:
            return
        rate = float(self._learning_rate())
        if self._rate is not None and rate < self._rate:
            self.critical = [True] * len(self.critical)
        self._rate = rate

    def _decide(self, exchange: Exchange) -> None:
        norms = torch.stack(torch._foreach_norm([self._sum[part] for part in self._parts]))
        squares = norms.double().square().cpu()
        exchange.sum_over_ranks(squares, "regimes")
        present = squares.sqrt().tolist()
        if self._last is not None:
            self._relax([self._changed(last, now) for last, now in zip(self._last, present, strict=True)])
        self._last = present

    def _changed(self, last: float, now: float) -> bool:
        return last == 0.0 or abs(last - now) >= self._threshold * last


class Accordion(CriticalRegimes):
    """Two compression levels, chosen for each tensor by its regime.

    The step's budget is what all tensors' own levels would send together::

        ratio = n / sum_l (n_l / r_l),    r_l = low where tensor l is critical, else high

    and the exchange spends it where the memory is heaviest, over all tensors. Errors stay in the
    memory when the level changes (the authors' top-k has no error feedback). Use it as
    ``Compression.topk(schedule=Accordion(…))``, one for each optimizer.

    Args:
        low: ratio in critical regimes, at least 1.
        high: ratio otherwise, at least ``low``.
        epoch_steps, every, threshold, learning_rate: see `CriticalRegimes`.

    Raises:
        ConfigurationError: for settings out of range.
    """

    def __init__(self, low: float, high: float, epoch_steps: int, **detector: Any) -> None:
        super().__init__(epoch_steps, **detector)
        if not 1.0 <= low <= high:
            raise ConfigurationError(f"Accordion: ratios must be 1 <= low <= high, got {low} and {high}")
        self._low, self._high = float(low), float(high)
        self._settings += f" {low} {high}"
        self._sizes: list[int] = []

    def __call__(self, step: int) -> float:
        """The ratio that the tensors' levels make together."""
        sent = sum(
            size / (self._low if critical else self._high)
            for size, critical in zip(self._sizes, self.critical, strict=True)
        )
        return min(max(sum(self._sizes) / sent, self._low), self._high) if sent else self._low

    def _parts_of(self, layout: Layout) -> list[slice]:
        parts = [slice(slot.offset, slot.stop) for slot in layout.slots if slot.stop <= layout.compressed]
        self._sizes = [part.stop - part.start for part in parts]
        return parts


class _Accumulates(Protocol):
    def set_backward_passes_per_step(self, passes: int) -> None: ...


class AccordionBatch(CriticalRegimes):
    """The batch-size variant: small batches in critical regimes, large ones by gradient accumulation else::

        for _ in range(regimes.begin_step(optimizer)):
            loss_of(next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    Passes are summed, so p passes at an unchanged learning rate are a batch p times as large at a
    rate p times as large: the linear scaling that the method asks for. A ``clip_norm`` applies to
    the sum. The whole gradient is judged at once, and the batch does not become small again
    before the learning rate decreases.

    Args:
        small, large: passes of a step in a critical regime and otherwise, 1 <= small <= large.
        ratio: the compression ratio, the same in every step.
        epoch_passes: backward passes of an epoch on one rank.
        every, threshold, learning_rate: see `CriticalRegimes`.

    Raises:
        ConfigurationError: for settings out of range.
    """

    def __init__(self, small: int, large: int, ratio: float, epoch_passes: int, **detector: Any) -> None:
        super().__init__(epoch_passes, **detector)
        if not 1 <= small <= large:
            raise ConfigurationError(f"AccordionBatch: passes must be 1 <= small <= large, got {small} and {large}")
        if not ratio >= 1.0:
            raise ConfigurationError(f"AccordionBatch: ratio must be at least 1, got {ratio}")
        self._small, self._large, self._ratio = small, large, float(ratio)
        self._settings += f" {small} {large} {ratio}"

    def __call__(self, step: int) -> float:
        """The ratio, which does not change."""
        return self._ratio

    def begin_step(self, optimizer: _Accumulates) -> int:
        """How many backward passes the coming step takes; tells the optimizer."""
        self._passes_of_step = self._small if all(self.critical) else self._large
        optimizer.set_backward_passes_per_step(self._passes_of_step)
        return self._passes_of_step

    def _parts_of(self, layout: Layout) -> list[slice]:
        return [slice(0, layout.total)]

    def _relax(self, critical: list[bool]) -> None:
        self.critical = [old and new for old, new in zip(self.critical, critical, strict=True)]


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
        sums = torch.tensor([self._captured, self._known], dtype=torch.float64)
        exchange.sum_over_ranks(sums, "energy")
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._ratio, self._count = state["ratio"], state["count"]
        self._captured, self._known = state["captured"], state["known"]


def _grid(ratio: float) -> float:
    return float(2.0 ** (math.floor(4.0 * math.log2(ratio)) / 4.0))
