"""Which compression ratio applies in which step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.saved import Form
from hvd_sketch.settings import given_numbers

Schedule = Callable[[int], float]
"""Maps the step (0, 1, …) to a ratio; 1 means dense. Must be the same function on every rank."""
_SAMPLED = (0, 1, 10, 100, 1000, 10000, 100000)


def sampled(schedule: Schedule) -> str:
    """The ratios of some steps, as text that ranks compare; of fewer, where the schedule ends."""
    ratios: list[str] = []
    with suppress(Exception):  # it is the user's, and may know no more steps than there will be
        for step in _SAMPLED:
            ratios.append(f"ratio_of_step_{step}={schedule(step):g}")
    return " ".join(ratios)


@given_numbers
def constant(ratio: float) -> Schedule:
    """The same ratio in every step.

    Raises:
        ConfigurationError: for a ratio below 1.
    """
    _check_ratio("constant", "ratio", ratio)
    return lambda step: ratio


@given_numbers
def warmup(ratio: float, steps: int, stages: int = 4) -> Schedule:
    """Grow geometrically from dense to ``ratio`` over ``steps`` steps, in equal stages.

    Stage s of n uses ``ratio ** (s / n)``, so the first is dense. Few stages, because each one
    allocates its buffers anew.

    Raises:
        ConfigurationError: for fewer steps than 0 or fewer stages than 1.
    """
    return exponential(1.0, ratio, steps, stages)


@given_numbers
def linear(start: float, end: float, steps: int, stages: int = 4) -> Schedule:
    """From ``start`` to ``end`` over ``steps`` steps; stage s of n uses ``start + (end - start) s / n``.

    Raises:
        ConfigurationError: for a ratio below 1, fewer steps than 0 or fewer stages than 1.
    """
    return _staged("linear", start, end, steps, stages, lambda share: start + (end - start) * share)


@given_numbers
def exponential(start: float, end: float, steps: int, stages: int = 4) -> Schedule:
    """From ``start`` to ``end`` over ``steps`` steps; stage s of n uses ``start (end / start) ** (s / n)``.

    Raises:
        ConfigurationError: for a ratio below 1, fewer steps than 0 or fewer stages than 1.
    """
    return _staged("exponential", start, end, steps, stages, lambda share: start * (end / start) ** share)


@given_numbers
def per_epoch(ratios: Sequence[float], steps_per_epoch: int) -> Schedule:
    """Ratio e in every step of epoch e; the last one from then on.

    Deep Gradient Compression (ICLR 2018) warms up by ``per_epoch([4, 16, 64, 256, 1000], n)``.

    Raises:
        ConfigurationError: for no ratio, one below 1, or fewer steps than 1 an epoch.
    """
    if not ratios or steps_per_epoch < 1:
        raise ConfigurationError(
            f"per_epoch: give at least one ratio and one step an epoch, got {list(ratios)} and {steps_per_epoch}"
        )
    for ratio in ratios:
        _check_ratio("per_epoch", "ratios", ratio)
    table = tuple(ratios)
    return lambda step: table[min(step // steps_per_epoch, len(table) - 1)]


class AdaptiveSchedule(ABC):
    """A schedule that learns from the steps of the one exchange it belongs to.

    What it decides by must be the same number on all ranks: something reduced. Its state rides in
    the exchange's, so that it is saved and resumed with the memory.
    """

    _attached = False

    @property
    def looks_outside(self) -> bool:
        """Whether it reads, in `Exchange.complete`, what is the caller's, such as an optimizer's learning rate."""
        return False

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from now on.

        Raises:
            ConfigurationError: when it follows another one already.
        """
        if self._attached:
            raise ConfigurationError(
                f"this {type(self).__name__} follows another optimizer already; make one for each optimizer"
            )
        self._attached = True
        exchange.observers.append(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows nothing yet."""
        return {**vars(self), "_attached": False}

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The ratio of the coming step."""

    @abstractmethod
    def observe(self, exchange: Exchange) -> None:
        """Learn from the step that was just done; called on all ranks, may communicate."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only."""

    def state_form(self) -> Form:
        """What `state_dict` looks like, see `hvd_sketch.saved`; unless told, anything will do."""
        return object

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def _staged(
    name: str, start: float, end: float, steps: int, stages: int, ratio_of: Callable[[float], float]
) -> Schedule:
    if steps < 0 or stages < 1:
        raise ConfigurationError(f"{name}: steps must be >= 0 and stages >= 1, got {steps} and {stages}")
    _check_ratio(name, "start", start)
    _check_ratio(name, "end", end)

    def ratio_at(step: int) -> float:
        return float(end) if step >= steps else float(ratio_of(step * stages // steps / stages))

    return ratio_at


@given_numbers
def _check_ratio(name: str, argument: str, ratio: float) -> None:
    if not ratio >= 1.0:
        raise ConfigurationError(f"{name}: {argument} must be a ratio of at least 1 (1 is dense), got {ratio}")
