"""Error feedback that anticipates: gradients are taken where the unsent ones will have taken the model."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import gpu
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.ahead import Ahead, AheadOptimizer
from hvd_sketch.error_feedback.base import ErrorFeedback, Wrapping
from hvd_sketch.error_feedback.factored_moments import FactoredMoments, MomentsObserver, check_adam
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.common_share import CommonShare, read_errors
from hvd_sketch.methods.exchanging import ExchangingOptimizer
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.methods.wiring import Wiring
from hvd_sketch.settings import check_numbers
from hvd_sketch.shards import is_sharded, local


@dataclass(frozen=True)
class Anticipate(ErrorFeedback):
    """Anticipating error feedback, for ``DistributedOptimizer(…, error_feedback=Anticipate())``.

    With model x, unsent gradients e_i of rank i, compressor C, and P(e), how far the wrapped
    optimizer will in the end move the model for a gradient e::

        z_i = x - P(a c e_i)                  where forward and backward run
        d_i = e_i + g_i(z_i)                  c_i = C(d_i)          e_i <- d_i - c_i
        x  <- the wrapped optimizer's step with the gradient mean_i c_i

        P(e) = lr e / (1 - m)                                     SGD with momentum m
        P(e) = lr e / (sqrt((v + (1 - b2) e^2) / (1 - b2^t)) + eps)     Adam, AdamW

    The exchange is the ordinary one, of gradients, so the second moments of Adam are of the mean
    gradient and the same on all ranks. `StepAhead` in contrast exchanges each rank's own steps. SGD
    may have Nesterov's momentum, for which P is the same, and dampening d, by which P is ``1 - d``
    times as large. With ``Compression.sharded`` an owner's memory holds the server's error as
    well, and counts by its share 1/W there.

    The model will move by the mean of all memories, of which a rank's own is a noisy guess: c is
    the factor that makes it the best one, see `CommonShare`, measured for each parameter on the way.
    And not all of it will be sent: later gradients take some of it back. That is what a is for.

    With ``second_moments`` Adam divides by those of the dense gradient, see `FactoredMoments`, and
    v above is the same.

    Sent: what the compressor sends, and what `CommonShare` and `FactoredMoments` do. Source: the step ahead of arXiv
    2008.05823, here by the whole response of the optimizer to the memory.

    Attributes:
        coefficient: a, above 0 and at most 1; None for 0.6 with SGD, and 1 with Adam, whose P is damped by e itself.
        second_moments: how to measure Adam's; None leaves them to Adam. Not for SGD, which has none.
    """

    coefficient: float | None = None
    second_moments: FactoredMoments | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.coefficient is not None and not 0.0 < self.coefficient <= 1.0:
            raise ConfigurationError(f"Anticipate coefficient must be above 0 and at most 1, got {self.coefficient}")

    def coefficient_of(self, optimizer: torch.optim.Optimizer) -> float:
        """The one that was given, or the optimizer's."""
        if self.coefficient is not None:
            return self.coefficient
        return 0.6 if isinstance(optimizer, torch.optim.SGD) else 1.0

    def check(self, optimizer: torch.optim.Optimizer, compression: Compressor) -> None:
        """Refuse optimizers whose response to a gradient is not known.

        Raises:
            ConfigurationError: naming those whose is.
        """
        adam = isinstance(optimizer, torch.optim.Adam) and not any(g["amsgrad"] for g in optimizer.param_groups)
        if not adam and not isinstance(optimizer, torch.optim.SGD):
            raise ConfigurationError(
                "error_feedback=Anticipate knows how SGD, Adam and AdamW (without amsgrad) respond to a gradient, "
                f"not how {type(optimizer).__name__} does; use StepAhead, or one of those"
            )
        if self.second_moments is not None:
            check_adam(optimizer)

    def wrap(self, wrapping: Wrapping) -> AnticipatingOptimizer:
        """An `AnticipatingOptimizer` over the optimizer that exchanges gradients."""
        shares = CommonShare()
        return AnticipatingOptimizer(wrapping, self.wiring(wrapping, shares), partial(self._ahead_of, shares))

    def wiring(self, wrapping: Wrapping, shares: CommonShare) -> Wiring:
        """How it is connected: with what it measures."""
        wiring = replace(wrapping.wiring, note=f"error_feedback={self}")
        if self.second_moments is None:
            return replace(wiring, followers=[shares])
        moments = MomentsObserver(self.second_moments, wrapping.named)
        return replace(wiring, followers=[shares, moments], before_step=moments.lend)

    def _ahead_of(self, shares: CommonShare, optimizer: AnticipatingOptimizer, flat: FlatParameters) -> Ahead:
        return Anticipation(optimizer, optimizer.its_exchange, flat, shares, self.coefficient_of(optimizer))


class AnticipatingOptimizer(AheadOptimizer, ExchangingOptimizer):
    """Exchanges gradients that were taken ahead of the model; used as `AheadOptimizer` says.

    Args:
        wrapping: what is wrapped.
        wiring: how it is connected.
        ahead_of: makes the place where gradients are taken, of the optimizer and its parameters.
    """

    def __init__(
        self,
        wrapping: Wrapping,
        wiring: Wiring,
        ahead_of: Callable[[Any, FlatParameters], Ahead],
    ) -> None:
        super().__init__(wrapping.optimizer, wrapping.named, wiring)
        flat = FlatParameters(self._named, wrapping.layout, next(iter(self._named.values())).device)
        self._look_ahead(ahead_of(self, flat), self._named)

    def __new__(cls, wrapping: Any = None, *arguments: Any) -> AnticipatingOptimizer:
        """Over the user's class."""
        return super().__new__(cls, wrapping.optimizer if isinstance(wrapping, Wrapping) else None)

    def its_exchange(self) -> Exchange:
        """The exchange, for who may hold a method of the optimizer but is copied with it."""
        return self.exchange

    def moves(self) -> bool:
        """Where there is anybody to exchange with."""
        return self._wiring.is_active()

    def synchronize(self) -> None:
        """Exchange the step's gradients, at x; see `ExchangingOptimizer`."""
        self._passes.finish()
        super().synchronize()

    def memory_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; save it on every rank, beside ``state_dict()``."""
        self.refuse_saving()
        return super().memory_state_dict()

    def gradient_computed(self, parameter: Tensor) -> None:
        """Called by backward."""
        super().gradient_computed(parameter)
        super(AheadOptimizer, self).gradient_computed(parameter)


class Anticipation(Ahead):
    """Ahead by P of what is unsent; ``shares`` follows the exchange of these parameters."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        exchange: Callable[[], Exchange],
        flat: FlatParameters,
        shares: CommonShare,
        coefficient: float,
    ) -> None:
        super().__init__(flat)
        self._optimizer, self._exchange, self._shares, self._coefficient = optimizer, exchange, shares, coefficient

    def move(self) -> None:
        """On a GPU by one kernel, which needs no vector for the point ahead."""
        optimizer, parameters, exchange = self._optimizer, self.flat.parameters, self._exchange()
        moments = [optimizer.state.get(each, {}).get("exp_avg_sq") for each in parameters]
        of_models = exchange.domain.is_models and not any(map(is_sharded, parameters))
        served = gpu.serves(self.synchronous.vector) and self._mover.serves(parameters, moments)
        if not (of_models and served):
            super().move()
            return
        rates = {each: group for group in optimizer.param_groups for each in group["params"]}
        numbers = [numbers_of(optimizer, rates[each], each) for each in parameters]
        shares = self._shares.shares
        if shares is None:  # nothing is unsent before the first step
            shares = torch.zeros(len(numbers), dtype=torch.float32, device=exchange.gradient.device)
        errors, factors = exchange.memory.residual, self._coefficient * shares
        self._mover(errors, exchange.owned, factors, moments, numbers, self.synchronous.vector)

    @cached_property
    def _mover(self) -> Any:
        kernels = importlib.import_module("hvd_sketch.error_feedback.anticipate_cuda")  # with Triton
        return kernels.Mover(self.flat.parameters, [(slot.offset, slot.stop) for slot in self.flat.layout.slots])

    @cached_property
    def _moved(self) -> Flat:
        return self.flat.new()

    def point(self, ahead: Flat) -> None:
        """By P of what is unsent behind x."""
        self._read(self._moved)
        errors = dict(zip(self.flat.parameters, self._moved.views, strict=True))
        for group in self._optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter in errors]
            respond(self._optimizer, group, parameters, [errors[parameter] for parameter in parameters])
        ahead.vector.sub_(self._moved.vector)

    def _read(self, into: Flat) -> None:
        """Copy a c e."""
        read_errors(self._exchange(), into.vector)
        self._weigh(into)

    def _weigh(self, errors: Flat) -> None:
        """Replace e by a c e."""
        if self._shares.shares is not None:
            factors = self._coefficient * self._shares.shares.to(self.flat.dtype)
            torch._foreach_mul_(errors.views, list(factors.unbind()))


def _rate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """That of P, by which a gradient moves the model in the end."""
    rate = -float(group["lr"]) if group.get("maximize") else float(group["lr"])
    if isinstance(optimizer, torch.optim.SGD):
        rate *= (1.0 - group["dampening"]) / (1.0 - group["momentum"])
    return rate


def numbers_of(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor
) -> tuple[float, float, float, float]:
    """The numbers of P for a parameter: ``lr, 1 - b2, 1 / sqrt(1 - b2^t), eps``, of which SGD has the first alone."""
    if isinstance(optimizer, torch.optim.SGD):
        return _rate(optimizer, group), 0.0, 0.0, 0.0
    state = optimizer.state.get(parameter)
    if not state:  # it was never stepped: nothing is unsent
        return 0.0, 0.0, 0.0, 0.0
    second = group["betas"][1]
    scale = 1.0 / math.sqrt(1.0 - second ** float(state["step"]))
    return _rate(optimizer, group), 1.0 - second, scale, float(group["eps"])


def respond(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[Tensor], errors: list[Tensor]
) -> None:
    """Replace gradients of a group's parameters by P of them, in place: how far they will move the model."""
    rate = _rate(optimizer, group)
    if not errors:  # no parameter of the group is trained
        return
    if isinstance(optimizer, torch.optim.SGD):
        torch._foreach_mul_(errors, rate)
        return
    states = [optimizer.state.get(parameter) or {} for parameter in parameters]
    for error, state in zip(errors, states, strict=True):
        if not state:  # of a parameter that was never stepped
            error.zero_()
    errors = [error for error, state in zip(errors, states, strict=True) if state]
    states = [state for state in states if state]
    if not errors:
        return
    second = group["betas"][1]
    sizes = [local(state["exp_avg_sq"]).to(error.dtype) for error, state in zip(errors, states, strict=True)]
    sizes = list(torch._foreach_addcmul(sizes, errors, errors, value=1.0 - second))
    torch._foreach_sqrt_(sizes)
    torch._foreach_div_(sizes, math.sqrt(1.0 - second ** float(states[0]["step"])))
    torch._foreach_add_(sizes, group["eps"])
    torch._foreach_div_(errors, sizes)
    torch._foreach_mul_(errors, rate)
