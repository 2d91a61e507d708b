"""Gradients taken elsewhere than at the model: moving parameters there and back, and the block that does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvd_sketch.error_feedback.passes import Passes
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.gradients import watches
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.methods.wrapper import WrappedOptimizer


class Ahead(ABC):
    """Moves parameters from the model x, the same on all ranks, to where gradients are taken, and back.

    Attributes:
        is_ahead: where they are.
        flat: the parameters as vectors; ``synchronous`` holds x while they are ahead.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self.flat = flat
        self.synchronous = self.flat.new()
        self.is_ahead = False

    @cached_property
    def ahead(self) -> Flat:
        """Holds the point ahead."""
        return self.flat.new()

    @abstractmethod
    def point(self, ahead: Flat) -> None:
        """Turn a vector that holds x into the point where the gradient is taken."""

    @torch.no_grad()
    def forth(self) -> None:
        """Put the parameters from x to the point ahead."""
        self.move()
        self.is_ahead = True

    def move(self) -> None:
        """Do so, with x kept in ``synchronous`` and the point in ``ahead``."""
        self.flat.read(self.synchronous)
        self.ahead.vector.copy_(self.synchronous.vector)
        self.point(self.ahead)
        self.flat.write(self.ahead)

    @torch.no_grad()
    def back(self) -> None:
        """Put the parameters back to x."""
        self.flat.write(self.synchronous)
        self.is_ahead = False


class AheadOptimizer(WrappedOptimizer):
    """An optimizer whose gradients are taken ahead of the model x: by itself, see `Passes`, in an unchanged loop.

    Who wants to see it, or has a model without modules, takes them in a block, and what would look at the model
    there is an error::

        with optimizer.step_ahead():
            loss_of(model(batch)).backward()
        optimizer.step()

    In both ways the parameters are x, the same on all ranks, wherever a script evaluates and saves.
    """

    _ahead: Ahead
    _names: dict[Tensor, str]
    _passes: Passes
    _in_block: bool

    if TYPE_CHECKING:  # by the other class that an optimizer of this kind is derived from

        @property
        def exchange(self) -> Exchange: ...

        def flush(self) -> None: ...

        def memory_state_dict(self) -> dict[str, Any]: ...

        def load_memory_state_dict(self, state: dict[str, Any]) -> None: ...

        def shared_state(self) -> dict[str, Any]: ...

        def take_over(self, state: dict[str, Any]) -> None: ...

    def _look_ahead(self, ahead: Ahead, named: Mapping[str, Tensor]) -> None:
        """From now on."""
        names = {parameter: name for name, parameter in named.items()}
        self._own(_ahead=ahead, _names=names, _in_block=False, _passes=Passes(ahead, names, self._is_followed))

    def _is_followed(self) -> bool:
        return self.moves() and watches(self, next(iter(self._names)))

    def moves(self) -> bool:
        """Whether the point where gradients are taken is another than x."""
        raise NotImplementedError

    @contextmanager
    def step_ahead(self) -> Iterator[None]:
        """Inside, the parameters are stepped ahead, for forward and backward only.

        Raises:
            RuntimeError: when it is nested.
        """
        if not self.moves():
            yield
            return
        if self._in_block:
            raise RuntimeError("step_ahead() inside step_ahead()")
        self._passes.finish()
        with ExitStack() as guards, self._passes.suspended(self._guard(guards)):
            self._in_block = True
            self._ahead.forth()
            try:
                yield
            finally:
                self._in_block = False
                self._ahead.back()

    def step(self, closure: Callable[[], Any] | None = None, **keywords: Any) -> Any:
        """One step; a closure is evaluated inside `step_ahead`."""
        if self._in_block:
            raise RuntimeError("step() inside step_ahead(): end the block after backward()")
        self._passes.finish()

        def inside() -> Any:
            assert closure is not None
            with torch.enable_grad(), self.step_ahead():
                return closure()

        return super().step(None if closure is None else inside, **keywords)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; refused inside `step_ahead`."""
        self.refuse_saving()
        return super().state_dict()

    def restart(self) -> None:
        """Begin anew, at x."""
        self._passes.finish()
        super().restart()

    def refuse_saving(self, *arguments: Any) -> None:
        """Refuse what would save parameters that are stepped ahead.

        Raises:
            RuntimeError: inside `step_ahead`.
        """
        if self._in_block:
            raise RuntimeError("state_dict() inside step_ahead(), where parameters are stepped ahead; save outside")

    def gradient_computed(self, parameter: Tensor) -> None:
        """Called by backward."""
        self._passes.took(parameter)

    def _guard(self, guards: ExitStack) -> Callable[[torch.nn.Module], None]:
        """To be called with each module that runs: refuses evaluating it and, while the guards stand, saving."""
        seen: set[torch.nn.Module] = set()

        def check(module: torch.nn.Module) -> None:
            if not any(parameter in self._names for parameter in module.parameters(recurse=False)):
                return
            if not torch.is_grad_enabled():
                raise RuntimeError(
                    "the model is evaluated without gradients inside step_ahead(), where its parameters are stepped "
                    "ahead; evaluate outside, and checkpoint activations with use_reentrant=False"
                )
            if module not in seen and not isinstance(module, torch.jit.ScriptModule):  # it has no such hooks
                seen.add(module)
                guards.callback(module.register_state_dict_pre_hook(self.refuse_saving).remove)

        return check

    def __getstate__(self) -> dict[str, Any]:
        """All but what follows the modules, which a copy does anew."""
        self.refuse_saving()
        self._passes.finish()
        return {name: value for name, value in super().__getstate__().items() if name != "_passes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own(_passes=Passes(self._ahead, self._names, self._is_followed))
