"""Gradients taken elsewhere than at the model: the block in which parameters are moved, and its guards."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from hvd_sketch.exchange import Exchange
from hvd_sketch.layout import Layout
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.methods.wrapper import WrappedOptimizer


class AheadOptimizer(WrappedOptimizer):
    """An optimizer whose gradients are taken inside a block::

        with optimizer.step_ahead():
            loss_of(model(batch)).backward()
        optimizer.step()

    Outside of it the parameters are the synchronous model x, the same on all ranks: evaluate
    and save there. A gradient taken outside, an evaluation or a ``state_dict()`` inside, are
    errors.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: dict[str, Tensor],
        layout: Layout,
        is_active: Callable[[], bool],
    ) -> None:
        super().__init__(optimizer)
        self._flat = FlatParameters(named, layout, next(iter(named.values())).device)
        self._names = {parameter: name for name, parameter in named.items()}
        self._is_active = is_active
        self._synchronous, self._ahead = self._flat.new(), self._flat.new()
        self._inside = self._differentiated = False
        self._guarded: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        for parameter in self._flat.parameters:
            parameter.register_post_accumulate_grad_hook(_gradient_hook(weakref.ref(self)))

    @property
    @abstractmethod
    def exchange(self) -> Exchange:
        """The exchange, for its ``stats``; its memory's residual is what this rank has not sent."""

    @abstractmethod
    def synchronize(self) -> None:
        """Exchange the step's gradients; ``p.grad`` of every parameter then is the global update."""

    @abstractmethod
    def flush(self) -> None:
        """Send everything in the next step; then the model alone is a checkpoint for any number of ranks."""

    @abstractmethod
    def memory_state_dict(self) -> dict[str, Any]:
        """What belongs to this rank alone; save it on every rank, beside ``state_dict()``."""

    @abstractmethod
    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part, after ``load_state_dict``."""

    @abstractmethod
    def point(self, ahead: Flat) -> None:
        """Turn a vector that holds the model x into the point where the gradient is taken."""

    def moves(self) -> bool:
        """Whether that point is another than x."""
        return self._is_active()

    @contextmanager
    def step_ahead(self) -> Iterator[None]:
        """Inside, the parameters are stepped ahead, for forward and backward only.

        Raises:
            RuntimeError: when it is nested, or no gradient was computed inside.
        """
        if not self.moves():
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

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; refused inside `step_ahead`."""
        self._refuse_saving()
        return super().state_dict()

    def _move_ahead(self) -> None:
        """Put the parameters from x to the point ahead; both are kept."""
        self._flat.read(self._synchronous)
        self._ahead.vector.copy_(self._synchronous.vector)
        self.point(self._ahead)
        self._flat.write(self._ahead)

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
        if self.moves() and not self._inside:
            raise RuntimeError(
                f"the gradient of {self._names[parameter]!r} was computed at the synchronous model: with "
                "error_feedback, forward and backward belong inside `with optimizer.step_ahead():`"
            )

    def _refuse_saving(self) -> None:
        if self._inside:
            raise RuntimeError("state_dict() inside step_ahead(), where parameters are stepped ahead; save outside")


def _gradient_hook(reference: weakref.ref[AheadOptimizer]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer._check_gradient(parameter)

    return hook


def _saving_hook(reference: weakref.ref[AheadOptimizer]) -> Callable[..., None]:
    def hook(*arguments: Any) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer._refuse_saving()

    return hook
