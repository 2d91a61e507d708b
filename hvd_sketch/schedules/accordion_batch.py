"""Accordion for batches: small ones while the gradient changes fast, large ones otherwise."""

from __future__ import annotations

from typing import Any, Protocol

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.schedules.critical_regimes import CriticalRegimes
from hvd_sketch.settings import given_numbers


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

    @given_numbers
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
