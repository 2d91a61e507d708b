"""Zeno: of a round's pushes those count that lower a loss on trusted data the most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import Gathered, Push, above_0, at_least_0, check, loss
from hvd_sketch.methods.server.validation import Served, Validate, Validation
from hvd_sketch.saved import Form
from hvd_sketch.settings import given_numbers


class Zeno(Gathered):
    """With the loss F_r on a sample of trusted data that is fresh in every round r::

        score_i = F_r(x) - F_r(x - rate u_i) - rho |u_i|^2
        x <- x - rate (mean of the u_i without the ``drop`` of lowest score)

    ``drop`` must be at least the number of hostile workers, which may be most of them. Of equal scores
    the higher ranks are dropped. Costs a loss a worker and one more, every round. Source: Xie, Koyejo,
    Gupta, "Zeno" (ICML 2019), arXiv 1805.10032.

    Args:
        validate: the loss on trusted data, see `Validate`.
        drop: b in the paper.
        rate: of the step; 1 where a push has a learning rate in it already.
        rho: of the penalty on the length, in units of a push; the released code takes the mean of the squares in place
            of their sum.
    """

    @given_numbers
    def __init__(self, validate: Validate, drop: int, *, rate: float = 1.0, rho: float = 0.0005) -> None:
        check(
            "Zeno",
            validate=loss(validate),
            drop=at_least_0(drop),
            rate=above_0(rate),
            rho=at_least_0(rho),
        )
        self.least = drop + 1
        self.rate, self._validate, self._drop, self._rho = rate, validate, drop, rho
        self._round = 0

    def start(self, served: Served) -> None:
        super().start(served)
        self._validation = Validation(self._validate, served)

    def _combine(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        scores = self.scores(model, [push.change for push in pushes])
        self._round += 1
        ranking = sorted(range(len(pushes)), key=lambda i: (-scores[i], i))
        kept = set(ranking[: len(pushes) - self._drop])
        mean = torch.stack([pushes[i].change for i in sorted(kept)]).mean(0)
        model.sub_(mean, alpha=self.rate)
        return [i in kept for i in range(len(pushes))]

    def scores(self, model: Tensor, updates: Sequence[Tensor]) -> list[float]:
        """Of the round's updates; not a number counts as minus infinity."""
        here = self._validation.loss(model, self._round)
        losses = (self._validation.loss(model - self.rate * update, self._round) for update in updates)
        penalties = (self._rho * float(torch.linalg.vector_norm(update)) ** 2 for update in updates)
        scores = [here - loss - penalty for loss, penalty in zip(losses, penalties, strict=True)]
        return [score if score == score else -torch.inf for score in scores]

    def state_dict(self) -> dict[str, Any]:
        return {"round": self._round}

    def state_form(self) -> dict[str, Form]:
        return {"round": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round = state["round"]
