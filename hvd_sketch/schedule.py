"""Which compression ratio applies in which step."""

from __future__ import annotations

from collections.abc import Callable

from hvd_sketch.errors import ConfigurationError

Schedule = Callable[[int], float]
"""Maps the step (0, 1, …) to a ratio; 1 means dense. Must be the same function on every rank."""


def constant(ratio: float) -> Schedule:
    """The same ratio in every step."""
    return lambda step: ratio


def warmup(ratio: float, steps: int, stages: int = 4) -> Schedule:
    """Grow geometrically from dense to ``ratio`` over ``steps`` steps, in equal stages.

    Stage s of n uses ``ratio ** (s / n)``, so the first is dense. Few stages, because each one
    allocates its buffers anew.

    Raises:
        ConfigurationError: for fewer steps than 0 or fewer stages than 1.
    """
    if steps < 0 or stages < 1:
        raise ConfigurationError(f"warmup: steps must be >= 0 and stages >= 1, got {steps} and {stages}")

    def ratio_at(step: int) -> float:
        if step >= steps:
            return ratio
        return float(ratio ** (step * stages // steps / stages))

    return ratio_at
