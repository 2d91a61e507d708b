"""FedAsync: the server's model moves towards each worker's, the less the staler that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.server.rules.base import Push, Rule, at_least_0, check
from hvd_sketch.settings import check_numbers, given_numbers

Staleness = Callable[[int], float]
"""Maps the staleness (0, 1, …) to a factor from 0 to 1."""


@dataclass(frozen=True)
class Polynomial:
    """``(1 + staleness) ** -exponent``; exponent 0 is constant."""

    exponent: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self)
        check("Polynomial", exponent=at_least_0(self.exponent))

    def __call__(self, staleness: int) -> float:
        """The factor."""
        return float((1.0 + staleness) ** -self.exponent)


@dataclass(frozen=True)
class Hinge:
    """1 up to a staleness of ``after``, then ``1 / (slope (staleness - after) + 1)``."""

    slope: float = 10.0
    after: int = 4

    def __post_init__(self) -> None:
        check_numbers(self)
        check(
            "Hinge",
            slope=at_least_0(self.slope),
            after=(self.after >= 0, "at least 0", self.after),
        )

    def __call__(self, staleness: int) -> float:
        """The factor."""
        return 1.0 / (self.slope * max(0, staleness - self.after) + 1.0)


class FedAsync(Rule):
    """With the model x_j = base - u that worker j arrived at, and its staleness t::

        a_t = alpha factor(t)          x <- (1 - a_t) x + a_t x_j

    Source: Xie, Koyejo, Gupta, "Asynchronous Federated Optimization" (2019), arXiv 1903.03934.

    Args:
        alpha: from 0 to 1.
        staleness: the factor; `Polynomial` with exponent 0.5, or `Hinge`, or any function.
    """

    needs_base = True

    @given_numbers
    def __init__(self, alpha: float = 0.6, staleness: Staleness | None = None) -> None:
        check(
            "FedAsync",
            alpha=(0.0 < alpha <= 1.0, "above 0 and at most 1", alpha),
            staleness=(
                staleness is None or callable(staleness),
                "a function such as Polynomial(), or None",
                staleness,
            ),
        )
        self.alpha, self._staleness = alpha, staleness or Polynomial()

    def weight(self, staleness: int) -> float:
        """a_t.

        Raises:
            ConfigurationError: for a factor that is not from 0 to 1.
        """
        factor = self._staleness(staleness)
        if not 0.0 <= factor <= 1.0:
            raise ConfigurationError(
                f"FedAsync: staleness must give a factor from 0 to 1, and gave {factor!r} for {staleness}"
            )
        return self.alpha * factor

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        for push in pushes:
            assert push.base is not None
            model.lerp_(push.base - push.change, self.weight(push.staleness))
        return [True] * len(pushes)
