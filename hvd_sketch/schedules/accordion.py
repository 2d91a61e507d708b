"""Accordion: compress a tensor little while its gradient changes fast, and much otherwise."""

from __future__ import annotations

from typing import Any

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.schedules.critical_regimes import CriticalRegimes
from hvd_sketch.settings import given_numbers


class Accordion(CriticalRegimes):
    """Two compression levels, chosen for each tensor by its regime::

        r_l = low where tensor l is critical, else high

    ``TensorTopK(schedule=Accordion(…))`` compresses every tensor at its own level, as the authors do.
    Other compressors choose among all coordinates at once, as in ``Compression.sharded(schedule=…)``:
    they get what the tensors' levels would send together, and spend it where the memory is heaviest::

        ratio = n / sum_l (n_l / r_l)

    Errors stay in the memory when a level changes (the authors' top-k has no error feedback). Make
    one for each optimizer.

    Args:
        low: ratio in critical regimes, at least 1.
        high: ratio otherwise, at least ``low``.
        epoch_steps, every, threshold, learning_rate: see `CriticalRegimes`.

    Raises:
        ConfigurationError: for settings out of range.
    """

    @given_numbers
    def __init__(self, low: float, high: float, epoch_steps: int, **detector: Any) -> None:
        super().__init__(epoch_steps, **detector)
        if not 1.0 <= low <= high:
            raise ConfigurationError(f"Accordion: ratios must be 1 <= low <= high, got {low} and {high}")
        self._low, self._high = float(low), float(high)
        self._settings += f" {low} {high}"
        self._sizes: list[int] = []

    def __call__(self, step: int) -> float:
        """The ratio that the tensors' levels make together."""
        sent = sum(size / ratio for size, ratio in zip(self._sizes, self.ratios, strict=True))
        return min(max(sum(self._sizes) / sent, self._low), self._high) if sent else self._low

    @property
    def ratios(self) -> list[float]:
        """The present level of every compressed tensor, in the layout's order."""
        return [self._low if critical else self._high for critical in self.critical]

    def _parts_of(self, layout: Layout) -> list[slice]:
        parts = [slice(slot.offset, slot.stop) for slot in layout.slots if slot.offset < layout.compressed]
        self._sizes = [part.stop - part.start for part in parts]
        return parts
