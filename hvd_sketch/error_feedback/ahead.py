"""Gradients taken elsewhere than at the model: moving parameters there and back, and the block that does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from hvd_sketch.exchange import Exchange
from hvd_sketch.layout import Layout
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.methods.wrapper import WrappedOptimizer


class Ahead(ABC):
    """Moves parameters from the model x, the same on all ranks, to where gradients are taken, and back.

    Args:
        named: the parameters, by name.
        layout: their order in a vector.

    Attributes:
        is_ahead: where they are.
        flat: the parameters as vectors; ``synchronous`` holds x while they are ahead.
    """

    def __init__(self, named: Mapping[str, Tensor], layout: Layout) -> None:
        self.flat = FlatParameters(named, layout, next(iter(named.values())).device)
        self.synchronous, self.ahead = self.flat.new(), self.flat.new()
        self.is_ahead = False

    @abstractmethod
    def point(self, ahead: Flat) -> None:
        """Turn a vector that holds x into the point where the gradient is taken."""

    @torch.no_grad()
    def forth(self) -> None:
        """Put the parameters from x to the point ahead; both are kept."""
        self.flat.read(self.synchronous)
        self.ahead.vector.copy_(self.synchronous.vector)
        self.point(self.ahead)
        self.flat.write(self.ahead)
        self.is_ahead = True

    @torch.no_grad()
    def back(self) -> None:
        """Put the parameters back to x."""
        self.flat.write(self.synchronous)
        self.is_ahead = False


class AheadOptimizer(WrappedOptimizer):
    """An optimizer whose gradients are taken inside a block::

        with optimizer.step_ahead():
            loss_of(model(batch)).backward()
        optimizer.step()

    Outside of it the parameters are the synchronous model x, the same on all ranks: evaluate
    and save there. A gradient taken outside, an evaluation or a ``state_dict()`` inside, are
    errors.
    """

    _ahead: Ahead
    _names: dict[Tensor, str]

    if TYPE_CHECKING:  # by the other class that an optimizer of this kind is derived from

        @property
        def exchange(self) -> Exchange: ...

        def flush(self) -> None: ...

        def memory_state_dict(self) -> dict[str, Any]: ...

        def load_memory_state_dict(self, state: dict[str, Any]) -> None: ...

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
        if self._ahead.is_ahead:
            raise RuntimeError("step_ahead() inside step_ahead()")
        self._ahead.forth()
        try:
            with ExitStack() as guards:
                self._guard(guards)
                yield
        finally:
            self._ahead.back()

    def step(self, closure: Callable[[], Any] | None = None, **keywords: Any) -> Any:
        """One step; a closure is evaluated inside `step_ahead`."""
        if self._ahead.is_ahead:
            raise RuntimeError("step() inside step_ahead(): end the block after backward()")

        def inside() -> Any:
            assert closure is not None
            with torch.enable_grad(), self.step_ahead():
                return closure()

        return super().step(None if closure is None else inside, **keywords)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; refused inside `step_ahead`."""
        self.refuse_saving()
        return super().state_dict()

    def refuse_saving(self, *arguments: Any) -> None:
        """Refuse what would save parameters that are stepped ahead.

        Raises:
            RuntimeError: inside `step_ahead`.
        """
        if self._ahead.is_ahead:
            raise RuntimeError("state_dict() inside step_ahead(), where parameters are stepped ahead; save outside")

    def gradient_computed(self, parameter: Tensor) -> None:
        """Called by backward.

        Raises:
            RuntimeError: when the gradient is not the one to step with.
        """
        if self.moves() and not self._ahead.is_ahead:
            raise RuntimeError(
                f"the gradient of {self._names[parameter]!r} was computed at the synchronous model: with "
                "error_feedback, forward and backward belong inside `with optimizer.step_ahead():`"
            )

    def _guard(self, guards: ExitStack) -> None:
        """Refuse, while the guards stand, evaluating and saving the model."""
        seen: set[torch.nn.Module] = set()

        def check(module: torch.nn.Module, arguments: Any) -> None:
            if not any(parameter in self._names for parameter in module.parameters(recurse=False)):
                return
            if not torch.is_grad_enabled():
                raise RuntimeError(
                    "the model is evaluated without gradients inside step_ahead(), where its parameters are stepped "
                    "ahead; evaluate outside, and checkpoint activations with use_reentrant=False"
                )
            if module not in seen:
                seen.add(module)
                guards.callback(module.register_state_dict_pre_hook(self.refuse_saving).remove)

        guards.callback(register_module_forward_pre_hook(check).remove)
