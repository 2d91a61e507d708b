"""The server's part of ADSAGA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import Push, Rule, above_0, check
from hvd_sketch.methods.server.validation import Served
from hvd_sketch.saved import Form
from hvd_sketch.settings import given_numbers

OnLost = Literal["keep", "remove"]


class Saga(Rule):
    """With n components in all, and ``average`` the mean of what all workers hold of their gradients::

        x <- x - rate (h + average),  average <- average + h / n          the average of before h

    Both in float64 but x. What a worker has sent in sum is kept too, so that it can be taken out.

    Args:
        rate: the learning rate.
        on_lost: what a lost worker sent stays in the average, or is taken out, until it returns.
    """

    tells = True

    @given_numbers
    def __init__(self, rate: float, on_lost: OnLost) -> None:
        demand = f"one of {get_args(OnLost)}"
        check("ADSAGA", rate=above_0(rate), on_lost=(on_lost in get_args(OnLost), demand, on_lost))
        self._rate, self._on_lost = rate, on_lost
        self._sums: dict[int, Tensor] = {}
        self._counted: set[int] = set()

    def start(self, served: Served) -> None:
        super().start(served)
        count = served.layout.total
        self.average = torch.zeros(count, dtype=torch.float64, device="cpu")
        self._sums = {worker: torch.zeros_like(self.average) for worker in served.workers}
        self._counted = set(served.workers)

    @property
    def components(self) -> int:
        """n: of the workers that count."""
        return sum(self._served.samples[worker] for worker in self._counted)

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        for push in pushes:
            h = push.change
            model.sub_(h + self.average.to(h.dtype), alpha=self._rate)
            self.average.add_(h.double() / self.components)
            self._sums[push.worker].add_(h)
        return [True] * len(pushes)

    def enter(self, worker: int, *, fresh: bool) -> None:
        sent = self._sums[worker]
        if worker not in self._counted:
            self._recount(self._counted | {worker}, sent)
        if fresh:
            self._recount(self._counted, -sent)
            sent.zero_()

    def leave(self, worker: int, *, lost: bool) -> None:
        if lost and self._on_lost == "remove" and self._counted > {worker}:
            self._recount(self._counted - {worker}, -self._sums[worker])

    def _recount(self, counted: set[int], change: Tensor) -> None:
        """Let these workers count; the sum of what they sent differs by ``change`` from that of those who did."""
        total = self.average * self.components + change
        self._counted = counted
        self.average = total / self.components

    def state_dict(self) -> dict[str, Any]:
        sums = {worker: total.clone() for worker, total in self._sums.items()}
        return {"average": self.average.clone(), "sums": sums, "counted": sorted(self._counted)}

    def state_form(self) -> dict[str, Form]:
        return {"average": self.average, "sums": self._sums, "counted": object}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.copy_(state["average"])
        for worker, total in state["sums"].items():
            self._sums[worker].copy_(total)
        self._counted = set(state["counted"])
