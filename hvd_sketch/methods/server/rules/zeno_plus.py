"""Zeno++: a push counts when it points where a gradient on trusted data points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import Push, Rule, above_0, at_least_0, check, loss
from hvd_sketch.methods.server.validation import Served, Validate, Validation
from hvd_sketch.saved import Form
from hvd_sketch.settings import check_numbers


@dataclass(eq=False)
class ZenoPlus(Rule):
    """With the gradient v on trusted data, at most ``refresh`` pushes old, and a push's gradient g~::

        g = g~ |v| / |g~|
        accepted if  rate <v, g> - rho |g|^2 >= -rate epsilon,    then  x <- x - rate g

    g is as long as v, so this is a test of the angle: ``cos(v, g~) >= rho / rate - epsilon / |v|^2``. It
    does not vote: any number of workers may be hostile. What to know before using it:

    * A step is as long as v, which near the optimum is the noise of the validation sample; ``clip``
      makes it no longer than the push.
    * The trusted data must follow the distribution of all workers' data together: honest workers with other
      classes are refused. ``stats.workers`` counts for each of them.
    * Compare with training on the trusted data alone: it may be as good.

    One gradient every ``refresh`` pushes, at the server. Source: Xie, Koyejo, Gupta, "Zeno++" (ICML
    2020), arXiv 1903.07020.

    Args:
        validate: the loss on trusted data, see `Validate`.
        refresh: pushes that one v serves.
        rate: the server's learning rate.
        rho: of the penalty on the length.
        epsilon: how much of ``|v|^2`` a push may lack.
        clip: g is no longer than g~ either.
        raw_norm: the penalty is on the length of g~, as in the released code.
        unit: a push over this is a gradient g~: its workers' learning rate times their period. It counts
            only with ``clip`` and ``raw_norm``.
        max_staleness: staler pushes are refused; None for none.
        tell: let workers know whether they were accepted; hostile ones learn from it.
    """

    validate: Validate
    _: KW_ONLY
    refresh: int = 10
    rate: float = 0.1
    rho: float = 0.001
    epsilon: float = 0.0
    clip: bool = False
    raw_norm: bool = False
    unit: float = 1.0
    max_staleness: int | None = None
    tell: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        oldest = self.max_staleness
        check(
            "ZenoPlus",
            validate=loss(self.validate),
            refresh=(self.refresh >= 1, "at least 1 push", self.refresh),
            rate=above_0(self.rate),
            rho=at_least_0(self.rho),
            epsilon=at_least_0(self.epsilon),
            unit=above_0(self.unit),
            max_staleness=(oldest is None or oldest >= 0, "at least 0 or None", oldest),
        )
        self.tells, self._arrivals = self.tell, 0

    def start(self, served: Served) -> None:
        super().start(served)
        self._validation = Validation(self.validate, served)
        self._direction = self._validation.nothing()

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        return [self._consider(model, push) for push in pushes]

    def _consider(self, model: Tensor, push: Push) -> bool:
        if self._arrivals % self.refresh == 0:
            self._direction = self._validation.gradient(model, self._arrivals // self.refresh)
        self._arrivals += 1
        if self.max_staleness is not None and push.staleness > self.max_staleness:
            return False
        length = float(torch.linalg.vector_norm(push.change)) / self.unit
        reach = float(torch.linalg.vector_norm(self._direction))
        if length == 0.0 or not self.score(push.change, self._direction) >= -self.rate * self.epsilon:
            return False  # also where the trusted data gave no finite direction
        step = min(length, reach) if self.clip else reach
        model.sub_(push.change, alpha=self.rate * step / (length * self.unit))
        return True

    def score(self, update: Tensor, direction: Tensor) -> float:
        """The left side of the test, for a push of any length but 0 against v."""
        length, reach = float(torch.linalg.vector_norm(update)), float(torch.linalg.vector_norm(direction))
        penalised = length / self.unit if self.raw_norm else reach
        return self.rate * float(torch.dot(direction, update)) * reach / length - self.rho * penalised**2

    def state_dict(self) -> dict[str, Any]:
        return {"direction": self._direction.clone(), "arrivals": self._arrivals}

    def state_form(self) -> dict[str, Form]:
        return {"direction": self._direction, "arrivals": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._direction, self._arrivals = state["direction"].clone(), state["arrivals"]
