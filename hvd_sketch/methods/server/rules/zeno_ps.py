"""ZenoPS: validators train on trusted data themselves, and compare."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import Gathered, Push, Rule, above_0, check, finite
from hvd_sketch.methods.server.validation import Served, Validate, Validation
from hvd_sketch.saved import Form
from hvd_sketch.settings import check_numbers


@dataclass(eq=False)
class _Validated(Rule):
    """What the two variants share: validators, what each of them did last, and the parts that are judged."""

    validators: Sequence[Validate] | Validate
    _: KW_ONLY
    rate: float
    steps: int = 1
    per_tensor: bool = False

    refresh = 1

    def __post_init__(self) -> None:
        check_numbers(self)
        losses: Any = [self.validators] if callable(self.validators) else self.validators
        are_losses = isinstance(losses, Sequence) and all(map(callable, losses))
        demand = "at least one loss, a function of a model and a number that returns it"
        check(
            type(self).__name__,
            validators=(are_losses and len(losses) > 0, demand, losses),
            rate=above_0(self.rate),
            steps=(self.steps >= 1, "at least 1", self.steps),
            refresh=(self.refresh >= 1, "at least 1 push", self.refresh),
        )
        self._given: list[Validate] = list(losses)
        self._turns = 0

    def start(self, served: Served) -> None:
        super().start(served)
        slots = [slice(slot.offset, slot.stop) for slot in served.layout.slots if slot.numel]
        self._parts = slots if self.per_tensor else [slice(0, served.layout.total)]
        self._validators = [Validation(validate, served) for validate in self._given]
        self._updates = [validator.nothing() for validator in self._validators]

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        if self._turns % self.refresh == 0:
            number = self._turns // self.refresh
            self._updates = [v.descent(model, number, self.rate, self.steps) for v in self._validators]
        self._turns += 1
        counted = [False] * len(pushes)
        for part in self._parts:
            for i in self._judge(model[part], part, pushes):
                counted[i] = True
        return counted

    @abstractmethod
    def _judge(self, model: Tensor, part: slice, pushes: Sequence[Push]) -> list[int]:
        """Change a part of the model; which pushes counted there."""

    def _validator_of(self, push: Push) -> int:
        return self._served.workers.index(push.worker) % len(self._validators)

    def state_dict(self) -> dict[str, Any]:
        return {"turns": self._turns, "updates": [update.clone() for update in self._updates]}

    def state_form(self) -> dict[str, Form]:
        return {"turns": int, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._turns, self._updates = state["turns"], [update.clone() for update in state["updates"]]


@dataclass(eq=False)
class ZenoPS(_Validated, Gathered):
    """Synchronous. Validator i takes ``steps`` steps on its trusted data from x, which makes v_i, and judges the
    pushes of every V-th worker::

        accepted if  mean(u v) > zeta mean(v^2)  and  mean(u^2) < (1 + rho) mean(v^2)
        x <- x - (sum over the validators of the mean of the accepted) / V

    A push that is all zeros is none. Judged whole, where the published form judges every tensor for
    itself, which lets a poisoned tensor through beside good ones. Costs ``steps`` gradients a
    validator and round, at the server. With ``up=`` a compressor and ``memory="reset"`` at the workers
    this is the paper's error reset; there, what was skipped once is lost, here it is sent later. There, a
    worker also takes part in a round with a given probability only; here all that are left take part in
    all of them. Source: Xie, Koyejo, Gupta, "ZenoPS" (Algorithms 15(7), 2022).

    Args:
        validators: the loss of each of the V validators on its trusted data, see `Validate`, or one.
        rate: their learning rate, as the workers'.
        steps: as many as a worker takes between two pushes.
        zeta, rho: see above.
        per_tensor: the published form.
    """

    _: KW_ONLY
    zeta: float = -0.001
    rho: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check("ZenoPS", rho=(-1.0 < self.rho < math.inf, "above -1 and finite", self.rho), zeta=finite(self.zeta))

    def _combine(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        return _Validated.apply(self, model, pushes)

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        return self._combine(model, pushes)

    def _judge(self, model: Tensor, part: slice, pushes: Sequence[Push]) -> list[int]:
        good = [i for i, push in enumerate(pushes) if self._passes(push, part)]
        for number in range(len(self._validators)):
            mine = [pushes[i].change[part] for i in good if self._validator_of(pushes[i]) == number]
            if mine:
                model.sub_(torch.stack(mine).mean(0), alpha=1.0 / len(self._validators))
        return good

    def _passes(self, push: Push, part: slice) -> bool:
        update, own = push.change[part], self._updates[self._validator_of(push)][part]
        squared, product = float(torch.dot(own, own)), float(torch.dot(update, own))
        length = float(torch.dot(update, update))
        return 0.0 < length < (1.0 + self.rho) * squared < math.inf and product > self.zeta * squared


@dataclass(eq=False)
class ZenoPSAsync(_Validated):
    """Asynchronous. With v of the validator of this worker, at most ``refresh`` pushes old::

        u <- u |v| / |u|  if |u| > |v|          s = cos(u, v)
        x <- x - alpha u  if s >= threshold     else nothing

    ``reverse`` is the published form, in which a push below the threshold counts as ``alpha s u``, with
    the opposite sign: that turns an attack by flipped signs into a gift, and lets whoever knows it
    steer. Everything else as for `ZenoPS`. The paper's workers also go a share p of the way back to the
    model they were sent in every step; for SGD at rate r that is ``proximal=p / r`` of `AsyncSGD`.

    Args:
        refresh: pushes that one v serves; 1, as published, takes ``steps`` gradients for every push.
        alpha, threshold: see above.
        max_staleness: staler pushes are refused; None for none.
    """

    _: KW_ONLY
    refresh: int = 10
    alpha: float = 0.8
    threshold: float = -0.02
    reverse: bool = False
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        oldest = self.max_staleness
        check(
            "ZenoPSAsync",
            alpha=(0.0 < self.alpha <= 1.0, "above 0 and at most 1", self.alpha),
            threshold=finite(self.threshold),
            max_staleness=(oldest is None or oldest >= 0, "at least 0 or None", oldest),
        )

    def _judge(self, model: Tensor, part: slice, pushes: Sequence[Push]) -> list[int]:
        return [i for i, push in enumerate(pushes) if self._consider(model, part, push)]

    def _consider(self, model: Tensor, part: slice, push: Push) -> bool:
        if self.max_staleness is not None and push.staleness > self.max_staleness:
            return False
        update, own = push.change[part], self._updates[self._validator_of(push)][part]
        length, reach = (float(torch.linalg.vector_norm(vector)) for vector in (update, own))
        if length == 0.0 or not 0.0 < reach < math.inf:
            return False
        cosine = float(torch.dot(update, own)) / (length * reach)
        weight = self.alpha * min(1.0, reach / length)
        if cosine >= self.threshold:
            model.sub_(update, alpha=weight)
        elif self.reverse:
            model.sub_(update, alpha=weight * cosine)
        return cosine >= self.threshold
