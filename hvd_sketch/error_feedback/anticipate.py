"""Error feedback that anticipates: gradients are taken where the unsent ones will have taken the model."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.ahead import AheadOptimizer
from hvd_sketch.error_feedback.base import Distributed, ErrorFeedback, Wrapping
from hvd_sketch.error_feedback.common_share import CommonShare, read_errors
from hvd_sketch.error_feedback.factored_moments import FactoredMoments, MomentsObserver, check_adam
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.methods.flat import Flat


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
        coefficient: a, above 0 and at most 1.
        second_moments: how to measure Adam's; None leaves them to Adam. Not for SGD, which has none.
    """

    coefficient: float = 0.6
    second_moments: FactoredMoments | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.coefficient <= 1.0:
            raise ConfigurationError(f"Anticipate coefficient must be above 0 and at most 1, got {self.coefficient}")

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
        if self.second_moments is None:
            distributed = wrapping.distribute([shares], None)
        else:
            moments = MomentsObserver(self.second_moments, wrapping.named)
            distributed = wrapping.distribute([shares, moments], moments.lend)
        return AnticipatingOptimizer(distributed, wrapping, shares, self)


class AnticipatingOptimizer(AheadOptimizer):
    """The optimizer that `Anticipate` asks for; used as `AheadOptimizer` says.

    ``optimizer`` is the distributed one, whose methods all work here too; ``shares`` follows its exchange.
    """

    def __init__(
        self, distributed: Distributed, wrapping: Wrapping, shares: CommonShare, settings: Anticipate
    ) -> None:
        trained = wrapping.trained
        optimizer: Any = distributed
        super().__init__(optimizer, trained, wrapping.compression.layout(trained.items()), wrapping.is_active)
        self._distributed = distributed
        self._settings, self._shares, self._moved = settings, shares, self._flat.new()

    @property
    def exchange(self) -> Exchange:
        """The exchange, for its ``stats``; its memory's residual is e_i."""
        return self._distributed.exchange

    def synchronize(self) -> None:
        """Exchange the step's gradients; ``p.grad`` of every parameter then is the global update."""
        self._distributed.synchronize()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """Let `step` inside the block leave the gradients alone, after a `synchronize` by hand."""
        return self._distributed.skip_synchronize()

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accumulate so many backward passes before an exchange."""
        self._distributed.set_backward_passes_per_step(passes)

    def flush(self) -> None:
        """Send everything in the next step; then the model alone is a checkpoint for any number of ranks."""
        self._distributed.flush()

    def memory_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; save it on every rank, beside ``state_dict()``."""
        self._refuse_saving()
        return self._distributed.memory_state_dict()

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's memory, after ``load_state_dict``."""
        self._distributed.load_memory_state_dict(state)

    def advance(self) -> None:
        """The distributed optimizer's own step."""
        self._distributed.step()

    def point(self, ahead: Flat) -> None:
        """By P of what is unsent behind x."""
        read_errors(self.exchange, self._moved.vector)
        if self._shares.shares is not None:
            factors = self._settings.coefficient * self._shares.shares.to(self._flat.dtype)
            torch._foreach_mul_(self._moved.views, list(factors.unbind()))
        errors = dict(zip(self._flat.parameters, self._moved.views, strict=True))
        for group in self.optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter in errors]
            respond(self.optimizer, group, parameters, [errors[parameter] for parameter in parameters])
        ahead.vector.sub_(self._moved.vector)


def respond(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[Tensor], errors: list[Tensor]
) -> None:
    """Replace gradients of a group's parameters by P of them, in place: how far they will move the model."""
    rate = -float(group["lr"]) if group.get("maximize") else float(group["lr"])
    if isinstance(optimizer, torch.optim.SGD):
        torch._foreach_mul_(errors, rate * (1.0 - group["dampening"]) / (1.0 - group["momentum"]))
        return
    states = [optimizer.state[parameter] for parameter in parameters]
    errors = [error for error, state in zip(errors, states, strict=True) if state]
    states = [state for state in states if state]  # a parameter without one was never stepped: nothing is unsent
    if not errors:
        return
    second = group["betas"][1]
    sizes = [state["exp_avg_sq"].to(error.dtype) for error, state in zip(errors, states, strict=True)]
    sizes = list(torch._foreach_addcmul(sizes, errors, errors, value=1.0 - second))
    torch._foreach_sqrt_(sizes)
    torch._foreach_div_(sizes, math.sqrt(1.0 - second ** float(states[0]["step"])))
    torch._foreach_add_(sizes, group["eps"])
    torch._foreach_div_(errors, sizes)
    torch._foreach_mul_(errors, rate)
