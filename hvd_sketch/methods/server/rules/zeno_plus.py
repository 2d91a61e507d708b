"""Zeno++: a push counts when it points where a gradient on trusted data points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import Push, Rule, check
from hvd_sketch.methods.server.validation import Served, Validate, Validation


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

    def __init__(
        self,
        validate: Validate,
        *,
        refresh: int = 10,
        rate: float = 0.1,
        rho: float = 0.001,
        epsilon: float = 0.0,
        clip: bool = False,
        raw_norm: bool = False,
        unit: float = 1.0,
        max_staleness: int | None = None,
        tell: bool = False,
    ) -> None:
        check(
            "ZenoPlus",
            refresh=(refresh >= 1, "at least 1 push", refresh),
            rate=(rate > 0.0, "above 0", rate),
            rho=(rho >= 0.0, "at least 0", rho),
            epsilon=(epsilon >= 0.0, "at least 0", epsilon),
            unit=(unit > 0.0, "above 0", unit),
            max_staleness=(max_staleness is None or max_staleness >= 0, "at least 0 or None", max_staleness),
        )
        self.rate, self.tells = rate, tell
        self._validate, self._refresh, self._rho, self._epsilon = validate, refresh, rho, epsilon
        self._clip, self._raw_norm, self._unit, self._max_staleness = clip, raw_norm, unit, max_staleness
        self._direction, self._arrivals = torch.empty(0, dtype=torch.float32, device="cpu"), 0

    def start(self, served: Served) -> None:
        super().start(served)
        self._validation = Validation(self._validate, served)

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        return [self._consider(model, push) for push in pushes]

    def _consider(self, model: Tensor, push: Push) -> bool:
        if self._arrivals % self._refresh == 0:
            self._direction = self._validation.gradient(model, self._arrivals // self._refresh)
        self._arrivals += 1
        if self._max_staleness is not None and push.staleness > self._max_staleness:
            return False
        length = float(torch.linalg.vector_norm(push.change)) / self._unit
        reach = float(torch.linalg.vector_norm(self._direction))
        if length == 0.0 or self.score(push.change, self._direction) < -self.rate * self._epsilon:
            return False
        step = min(length, reach) if self._clip else reach
        model.sub_(push.change, alpha=self.rate * step / (length * self._unit))
        return True

    def score(self, update: Tensor, direction: Tensor) -> float:
        """The left side of the test, for a push of any length but 0 against v."""
        length, reach = float(torch.linalg.vector_norm(update)), float(torch.linalg.vector_norm(direction))
        penalised = length / self._unit if self._raw_norm else reach
        return self.rate * float(torch.dot(direction, update)) * reach / length - self._rho * penalised**2

    def state_dict(self) -> dict[str, Any]:
        return {"direction": self._direction.clone(), "arrivals": self._arrivals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._direction, self._arrivals = state["direction"].clone(), state["arrivals"]
