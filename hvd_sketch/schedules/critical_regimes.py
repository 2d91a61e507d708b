"""When the gradient changes fast: the detector that Accordion switches by."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.layout import Layout
from hvd_sketch.saved import Form, Maybe
from hvd_sketch.schedules.base import AdaptiveSchedule
from hvd_sketch.settings import given_numbers


class CriticalRegimes(AdaptiveSchedule):
    """Which parts of the gradient are in a critical regime.

    With A the sum of a rank's raw gradients over an epoch, and every P epochs, for each part::

        D = sqrt(mean_i ||A_i||^2)           critical  <=>  |D_last - D| >= threshold * D_last

    Critical as well: everything before the first two detections, and everything from a decrease
    of the learning rate until the next detection. The sums of squares are reduced over the ranks,
    so all of them decide alike (the authors decide by rank 0's gradient alone). What it has decided
    holds for another number of ranks as well: `load_state_dict` what rank 0 had.

    The gradient is what is handed to the exchange; with `StepAhead` that is the rank's step, in which
    the learning rate counts as well.

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

    @given_numbers
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
        self._rate: float | None = None
        self.critical: list[bool] = []
        self._last: list[float] | None = None
        self._sum = torch.empty(0, dtype=torch.float32, device="cpu")
        self._parts: list[slice] = []

    @property
    def looks_outside(self) -> bool:
        """At the learning rate, where it is given."""
        return self._learning_rate is not None

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

    def state_form(self) -> Form:
        """Of as many parts."""
        parts = len(self._parts)
        return {
            "passes": int,
            "rate": Maybe(float),
            "critical": [bool] * parts,
            "last": Maybe([float] * parts),
            "sum": self._sum,
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
        epoch = self._passes // self._epoch_passes
        self._passes += self._passes_of_step
        if epoch % self._every != 0:
            return
        self._sum.add_(exchange.in_model(exchange.gradient))
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
        exchange.rounds.sum_values(squares, "regimes")
        present = squares.div_(exchange.comm.size).sqrt_().tolist()
        if self._last is not None:
            self._relax([self._changed(last, now) for last, now in zip(self._last, present, strict=True)])
        self._last = present

    def _changed(self, last: float, now: float) -> bool:
        return last == 0.0 or abs(last - now) >= self._threshold * last
