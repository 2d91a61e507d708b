"""SAEF: gradients are taken where the unsent errors are already applied."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from hvd_sketch.comm import Communicator
from hvd_sketch.compressor import Compressor
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.methods.displacement import displacement_exchange
from hvd_sketch.methods.flat import FlatParameters
from hvd_sketch.methods.undo import Undo
from hvd_sketch.methods.wrapper import WrappedOptimizer


@dataclass(frozen=True)
class StepAhead:
    """Step-ahead error feedback, for ``DistributedOptimizer(…, error_feedback=StepAhead())``.

    With model x, error e_i of rank i in units of the update, compressor C and the wrapped
    optimizer's step Δ (for SGD ``lr m_i``, with its momentum and weight decay), which is local::

        z_i = x - a e_i                      where forward and backward run
        d_i = e_i + Δ(z_i)                   c_i = C(d_i)          e_i <- d_i - c_i
        x  <- x - mean_i c_i                 every P steps: e_i <- mean_i e_i

    So ``x - mean_i e_i`` moves by exactly ``-mean_i Δ``. a = 0 is ordinary error feedback, a = 1
    SAEF. With ``Compression.sharded`` the way down is compressed as well, and the server's error
    is part of its owner's e_i; there the owner steps ahead by its share 1/W of it.

    Sent: what the compressor sends, and ``total / P`` float32 values a step in the mean.
    Source: Xu, Huo, Huang, "Step-Ahead Error Feedback for Distributed Training with Compressed
    Gradient" (AAAI 2021), arXiv 2008.05823; a < 1: SA-PEF, arXiv 2601.20738.

    Attributes:
        coefficient: a, 0 to 1.
        averaging_period: P in steps; 0 for never.
    """

    coefficient: float = 1.0
    averaging_period: int = 20

    def __post_init__(self) -> None:
        if not 0.0 <= self.coefficient <= 1.0:
            raise ConfigurationError(f"StepAhead coefficient must be between 0 and 1, got {self.coefficient}")
        if self.averaging_period < 0:
            raise ConfigurationError(f"StepAhead averaging_period must be at least 0, got {self.averaging_period}")


class StepAheadOptimizer(WrappedOptimizer):
    """The optimizer that `StepAhead` asks for::

        with optimizer.step_ahead():
            loss_of(model(batch)).backward()
        optimizer.step()

    Outside the block the parameters are the synchronous model x, the same on all ranks: evaluate
    and save there. A gradient taken outside, an evaluation or a ``state_dict()`` inside, are
    errors. Gradients are clipped on each rank to the compressor's ``clip_norm``. When some rank's
    gradient is not finite, or the exchange fails, then x, all errors and all ranks' optimizers stay
    as they were before the step. A ``torch.amp.GradScaler`` may be used as always.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, Tensor]],
        compression: Compressor,
        communicator: Callable[[], Communicator],
        is_active: Callable[[], bool],
        settings: StepAhead,
    ) -> None:
        super().__init__(optimizer)
        named = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        device = next(iter(named.values())).device
        self._flat = FlatParameters(named, compression.layout(named.items()), device)
        self._names = {parameter: name for name, parameter in named.items()}
        self._compression, self._settings = compression, settings
        self._communicator, self._is_active = communicator, is_active
        self._synchronous, self._ahead, self._stepped = (self._flat.new() for _ in range(3))
        self._undo = Undo(optimizer)
        self._inside = self._differentiated = False
        self._guarded: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        for parameter in self._flat.parameters:
            parameter.register_post_accumulate_grad_hook(_gradient_hook(weakref.ref(self)))

    @cached_property
    def exchange(self) -> Exchange:
        """The exchange, for its ``stats``; made on first use. Its memory's residual is e_i."""
        device = self._synchronous.vector.device
        exchange = displacement_exchange(self._compression, self._flat.layout, self._communicator(), device)
        exchange.agree_on(f"{self._settings} clip_norm={self._compression.clip_norm}")
        return exchange

    @contextmanager
    def step_ahead(self) -> Iterator[None]:
        """Inside, the parameters are ``x - a e_i``, for forward and backward only.

        Raises:
            RuntimeError: when it is nested, or no gradient was computed inside.
        """
        if not self._moves():
            yield
            return
        if self._inside:
            raise RuntimeError("step_ahead() inside step_ahead()")
        with torch.no_grad():
            self._move_ahead()
        self._inside, self._differentiated = True, False
        guard = register_module_forward_pre_hook(self._check_forward)
        try:
            yield
        finally:
            guard.remove()
            self._inside = False
            with torch.no_grad():
                self._flat.write(self._synchronous)
        if not self._differentiated:
            raise RuntimeError(
                "no gradient was computed inside step_ahead(); the parameters are stepped ahead there: "
                "evaluate and save outside of it"
            )

    def synchronize(self) -> None:
        """Refused: gradients are never exchanged, only steps are."""
        raise ConfigurationError(
            "with error_feedback the step itself is exchanged, so there are no averaged gradients to look at; "
            "to clip, set the compressor's clip_norm"
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is evaluated inside `step_ahead`."""
        if self._inside:
            raise RuntimeError("step() inside step_ahead(): end the block after backward()")
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.step_ahead():
                loss = closure()
        super().step()
        return loss

    def flush(self) -> None:
        """Send everything in the next step; then the model alone is a checkpoint for any number of ranks."""
        self.exchange.flush()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, of this rank; refused inside `step_ahead`."""
        self._refuse_saving()
        return super().state_dict()

    def memory_state_dict(self) -> dict[str, Any]:
        """A copy of what belongs to this rank alone: its error, and its optimizer's state (momentum is local)."""
        self._refuse_saving()
        return {"exchange": self.exchange.state_dict(), "optimizer": copy.deepcopy(super().state_dict())}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part, after ``load_state_dict``; see `Exchange.load_state_dict`."""
        self.exchange.load_state_dict(state["exchange"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _advance(self) -> None:
        if not self._is_active():
            self.optimizer.step()
            return
        norm = float(torch.nn.utils.clip_grad_norm_(self._flat.parameters, self._compression.clip_norm or math.inf))
        exchange, taken = self.exchange, False
        self._undo.note()
        self._move_ahead()
        if math.isfinite(norm):
            self.optimizer.step()
            self._flat.read(self._stepped)
            exchange.submit_all(self._ahead.vector.sub_(self._stepped.vector))
        else:
            exchange.submit_all(self._ahead.vector.fill_(math.nan))
        try:
            exchange.run()
            taken = not math.isnan(float(exchange.update[0]))
        finally:
            if taken:
                self._synchronous.vector.sub_(exchange.update)
            else:
                self._undo.restore()
            self._flat.write(self._synchronous)
        period = self._settings.averaging_period
        if period and exchange.step % period == 0:
            exchange.average_memory()

    def _move_ahead(self) -> None:
        """Put the parameters from x to ``x - a e_i``; both are kept, the latter as the parameters' dtype has it."""
        residual, owned = self.exchange.memory.residual, self.exchange.owned
        coefficient, others = self._settings.coefficient, 1.0 - 1.0 / self.exchange.comm.size
        self._flat.read(self._synchronous)
        torch.sub(self._synchronous.vector, residual, alpha=coefficient, out=self._ahead.vector)
        self._ahead.vector[owned].add_(residual[owned], alpha=coefficient * others)
        self._flat.write(self._ahead)
        self._flat.read(self._ahead)

    def _moves(self) -> bool:
        return self._settings.coefficient > 0.0 and self._is_active()

    def _check_forward(self, module: torch.nn.Module, arguments: Any) -> None:
        if not any(parameter in self._names for parameter in module.parameters(recurse=False)):
            return
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "the model is evaluated without gradients inside step_ahead(), where its parameters are stepped "
                "ahead; evaluate outside, and checkpoint activations with use_reentrant=False"
            )
        if module not in self._guarded:
            self._guarded.add(module)
            module.register_state_dict_pre_hook(_saving_hook(weakref.ref(self)))

    def _check_gradient(self, parameter: Tensor) -> None:
        self._differentiated = True
        if self._moves() and not self._inside:
            raise RuntimeError(
                f"the gradient of {self._names[parameter]!r} was computed at the synchronous model: with StepAhead, "
                "forward and backward belong inside `with optimizer.step_ahead():`"
            )

    def _refuse_saving(self) -> None:
        if self._inside:
            raise RuntimeError("state_dict() inside step_ahead(), where parameters are stepped ahead; save outside")

    def _restart(self) -> None:
        if "exchange" in vars(self):
            self.exchange.reset()


def check_step_ahead(compression: Any, momentum_correction: bool, *, averages: bool) -> None:
    """Refuse what does not go with `StepAhead`.

    Raises:
        ConfigurationError: naming the argument of ``DistributedOptimizer``.
    """
    problem = None
    if not isinstance(compression, Compressor):
        problem = f"needs a compressor with errors to step by, got {compression!r}"
    elif compression.momentum is not None or momentum_correction:
        problem = "exchanges the wrapped optimizer's steps, momentum included; leave momentum correction away"
    elif not averages:
        problem = "averages the ranks' steps, which have a learning rate already; use op=Average"
    if problem is not None:
        raise ConfigurationError(f"error_feedback=StepAhead {problem}")


def _gradient_hook(reference: weakref.ref[StepAheadOptimizer]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer._check_gradient(parameter)

    return hook


def _saving_hook(reference: weakref.ref[StepAheadOptimizer]) -> Callable[..., None]:
    def hook(*arguments: Any) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer._refuse_saving()

    return hook
