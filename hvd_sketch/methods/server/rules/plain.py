"""Asynchronous SGD."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvd_sketch.methods.server.rules.base import Push, Rule, above_0, check
from hvd_sketch.settings import given_numbers


class Plain(Rule):
    """Every push is applied when it comes, however stale: ``x <- x - rate u``.

    With one local step of SGD at learning rate r, u is r times a gradient: asynchronous SGD.
    """

    @given_numbers
    def __init__(self, rate: float = 1.0) -> None:
        check("Plain", rate=above_0(rate))
        self.rate = rate

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        for push in pushes:
            model.sub_(push.change, alpha=self.rate)
        return [True] * len(pushes)
