"""Putting a class over the user's optimizer: an instance of its class, which shares everything with it."""

from __future__ import annotations

import types
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hvd_sketch.compatibility import check_steps_once, parameters_kept
from hvd_sketch.errors import ConfigurationError

HOROVODS_MODULE = "horovod.torch.optimizer"
"""By this name of its class's module ``hvd.broadcast_optimizer_state`` tells a distributed optimizer from others."""

_Wrapper = TypeVar("_Wrapper", bound="WrappedOptimizer")


class PlainStep(torch.optim.Optimizer):
    """The step of the wrapped optimizer alone.

    It stands right behind the class of a wrapper, where ``hvd.broadcast_optimizer_state`` looks for a step that
    does not communicate, to make the state that some ranks lack.
    """

    optimizer: torch.optim.Optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer for its state alone."""
        with parameters_kept(self.optimizer):
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)


class WrappedOptimizer(torch.optim.Optimizer):
    """Is an instance of the class of the optimizer that it wraps, and shares everything with it.

    Groups, state and every attribute that is not a method's own are the wrapped optimizer's, so that
    learning-rate schedulers, scalers and hooks may hold either of the two. Its class is named like the
    user's; a copy, or what is loaded from a pickle, is such an optimizer as well.

    A ``torch.amp.GradScaler`` calls `step` in every step on every rank, and tells it the scale: what to do
    with a gradient that is not finite is left to the method.

    Attributes:
        optimizer: the wrapped one.

    Raises:
        ConfigurationError: for an optimizer that re-evaluates its closure, or is wrapped already.
    """

    optimizer: torch.optim.Optimizer
    _step_supports_amp_scaling = (
        True  # else a scaler would skip a step, and with it the collectives, on one rank alone
    )

    def __new__(cls: type[_Wrapper], optimizer: Any = None, *args: Any, **keywords: Any) -> _Wrapper:
        """An instance of a class over the user's."""
        over = class_over(cls, type(optimizer)) if isinstance(optimizer, torch.optim.Optimizer) else cls
        made: _Wrapper = object.__new__(over)
        return made

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        check_steps_once(optimizer)
        if type(optimizer).__module__ == HOROVODS_MODULE:
            raise ConfigurationError("the optimizer is already a DistributedOptimizer; wrap the plain one")
        self._own(optimizer=optimizer)

    def _own(self, **attributes: Any) -> None:
        """Set attributes of the wrapper itself, whatever the wrapped optimizer calls its own."""
        self.__dict__.update(attributes)

    if not TYPE_CHECKING:  # a type checker would take any name for one of ours

        def __getattr__(self, name: str) -> Any:
            if "optimizer" not in self.__dict__:  # a copy in the making
                raise AttributeError(name)
            return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        wrapped = self.__dict__.get("optimizer")
        shared = wrapped is not None and name in vars(wrapped) and name not in self.__dict__ and name != "step"
        if shared and not hasattr(WrappedOptimizer, name):
            setattr(wrapped, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what is exchanged is fixed when the optimizer is wrapped."""
        raise ConfigurationError(
            "add_param_group after the optimizer was wrapped: the new parameters would never be exchanged; add them "
            "before wrapping, or add them to the plain optimizer, then wrap it again"
        )

    def discard(self) -> None:
        """Throw the gradients away that were computed; nothing of them is kept anywhere."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state, and begin anew at the model's present parameters."""
        self.optimizer.load_state_dict(state_dict)
        self.restart()

    def __reduce__(self) -> Any:
        cls = type(self)
        over, base = cls.__bases__[1:]
        return _bare, (over, base), self.__getstate__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __getstate__(self) -> dict[str, Any]:
        passing = ("step", "grad_scale", "found_inf")  # of schedulers and scalers that hold the original
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _unscale(self) -> None:
        """Divide the gradients by the scale that a scaler left for this step."""
        scale = self.__dict__.get("grad_scale")
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, float(scale.double().reciprocal()))

    def restart(self) -> None:
        """Forget the method's own state."""
        return


class Method(WrappedOptimizer):
    """A wrapper whose step is one local step, on unscaled gradients, and what the method adds to it."""

    def step(self, closure: Callable[[], Any] | None = None, **keywords: Any) -> Any:
        """One local step and what the method adds to it; a closure is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._unscale()
            self.advance(**keywords)
        return loss

    @abstractmethod
    def advance(self, **keywords: Any) -> None:
        """One step of the method, without gradient tracking; keywords are the wrapped optimizer's own."""


_classes: dict[tuple[type, type], type] = {}


def class_over(wrapper: type[_Wrapper], base: type[torch.optim.Optimizer]) -> type[_Wrapper]:
    """The class of wrappers of a user's class: named like it, and derived from both."""
    if (wrapper, base) not in _classes:
        body = {"__module__": HOROVODS_MODULE, "__doc__": base.__doc__} | _uncompiled(wrapper)
        bases = (PlainStep, wrapper, base)
        _classes[wrapper, base] = types.new_class(base.__name__, bases, exec_body=lambda names: names.update(body))
    return _classes[wrapper, base]


def _uncompiled(wrapper: type[WrappedOptimizer]) -> dict[str, Any]:
    """What sends, not to be compiled where a script compiles its step; the class behind has the plain step alone."""
    names = [name for name in ("step", "synchronize", "zero_grad") if _is_ours(getattr(wrapper, name, None))]
    return {name: torch.compiler.disable(getattr(wrapper, name)) for name in names}


def _is_ours(method: Any) -> bool:
    return method is not None and method is not torch.optim.Optimizer.zero_grad


def _bare(wrapper: type[_Wrapper], base: type[torch.optim.Optimizer]) -> _Wrapper:
    """An instance to which a copy's state is given."""
    made: _Wrapper = object.__new__(class_over(wrapper, base))
    return made
