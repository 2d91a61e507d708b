"""Updates that were exchanged before anybody knows who steps with them, and the steps of all optimizers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.progress import Undo


class Unstepped:
    """The last update of an exchange, until optimizers have stepped with it, or the script has thrown it away.

    Of several optimizers, each steps its own parameters; what is cleared of the others is taken back alone.

    Args:
        exchange: of these parameters.
        parameters: in the layout's order.
    """

    def __init__(self, exchange: Exchange, parameters: Sequence[Tensor]) -> None:
        self._exchange, self._parameters = exchange, parameters
        self._undo: Undo | None = None
        self._rest: set[int] = set()
        """Positions of the parameters that nobody has stepped."""
        self._noted: tuple[int, Tensor, int] | None = None
        """A parameter's position, and its gradient and that one's version, as backward has left them."""

    @property
    def pending(self) -> bool:
        """Whether there is an update with which nobody has stepped."""
        return self._undo is not None and len(self._rest) == len(self._parameters)

    def begin(self) -> None:
        """Remember what there is before another update."""
        self._undo, self._rest, self._noted = self._exchange.snapshot(), set(range(len(self._parameters))), None

    def note(self) -> None:
        """Backward has just put the update in its place; as long as nobody writes to it, nobody has to look at it."""
        gradients = ((at, self._parameters[at].grad) for at in range(len(self._parameters) - 1, -1, -1))
        self._noted = next(((at, grad, grad._version) for at, grad in gradients if grad is not None), None)

    def settle(self) -> None:
        """What was exchanged counts."""
        self._undo = self._noted = None

    def step(self, positions: Iterable[int]) -> None:
        """These parameters are stepped with it."""
        self._rest.difference_update(positions)
        if not self._rest:
            self.settle()

    def take_back_cleared(self) -> bool:
        """Undo what was exchanged of the rest, if its update is gone; as long as it is there, it counts."""
        rest = (self._parameters[position].grad for position in self._rest)
        if self._undo is None or self._is_as_noted() or any(grad is not None and bool(grad.any()) for grad in rest):
            return False
        self._go_back(self._undo)
        self._undo = None
        return True

    def saved(self) -> dict[str, Any]:
        """The exchange's state as it will be if the update is never stepped with, as by who loads it."""
        if self._undo is None:
            return self._exchange.state_dict()
        now = self._exchange.snapshot()
        self._go_back(self._undo)
        state = self._exchange.state_dict()
        now()
        return state

    def _is_as_noted(self) -> bool:
        """Told without waiting for a GPU."""
        if self._noted is None:
            return False
        position, gradient, version = self._noted
        now = self._parameters[position].grad
        return position in self._rest and now is gradient and now._version == version

    def _go_back(self, undo: Undo) -> None:
        undo(None if self.pending else self._rest)


class Steps:
    """Which optimizer steps these parameters: the one that was given, or one that has taken its place.

    Args:
        given: the first.
        positions: of the parameters.

    Attributes:
        groups: of that optimizer.
        ever: whether there was any step, by whomever.
    """

    def __init__(self, given: torch.optim.Optimizer, positions: Mapping[Tensor, int]) -> None:
        self._given, self._positions = weakref.ref(given), positions
        self._outer: weakref.ref[torch.optim.Optimizer] | None = None
        self._stepped: set[int] = set()
        self._given_too = self.ever = False
        self.groups = given.param_groups

    @property
    def given(self) -> torch.optim.Optimizer | None:
        """The optimizer, if it lives."""
        return self._given()

    @property
    def inside(self) -> bool:
        """Whether a step is under way."""
        return self._outer is not None

    def begin(self, optimizer: torch.optim.Optimizer) -> bool:
        """A step begins, perhaps inside of another one; whether it is one of these parameters."""
        held = self._held_in(optimizer.param_groups)
        if held and (self._outer is None or self._outer() in (None, optimizer)):
            self._outer, self._given_too, self.ever = weakref.ref(optimizer), False, True
            self._stepped.clear()
        if optimizer is self._given():
            self._given_too, self.groups = True, optimizer.param_groups
        self._stepped |= held
        return bool(held)

    def end(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """The positions that were stepped, if this was the end of a step that is not inside of another one."""
        if self._outer is None or self._outer() is not optimizer:
            return set()
        self._outer = None
        return self._stepped

    def succeeded_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """After its step: whether it has stepped all that the given one holds, without it, and takes its place."""
        if self._given_too or not self._held_in(optimizer.param_groups) >= self._held_in(self.groups):
            return False
        self._given, self.groups = weakref.ref(optimizer), optimizer.param_groups
        return True

    def _held_in(self, groups: Sequence[Mapping[str, Any]]) -> set[int]:
        held = (parameter for group in groups for parameter in group["params"])
        return {self._positions[parameter] for parameter in held if parameter in self._positions}


def warn_of_local_step() -> None:
    """A step was with what this rank has computed inside ``no_sync()``, and nobody has exchanged."""
    warnings.warn(
        "hvd_sketch: an optimizer has stepped with this rank's own gradients, computed inside no_sync(): they are not "
        "exchanged, and the ranks' models differ unless the script averages them; step after a backward pass outside "
        "of it. Without no_sync(), the model has no hook: model.register_comm_hook(state, hvd_sketch.ddp.hook)",
        stacklevel=2,
    )


class Listener(Protocol):
    """Is told of each step of each optimizer."""

    def step_begins(self, optimizer: torch.optim.Optimizer) -> None: ...

    def step_ends(self, optimizer: torch.optim.Optimizer) -> None: ...


_listening: list[weakref.ref[Any]] = []
_installed: list[Any] = []


def listen(listener: Listener) -> None:
    """Tell it of steps as long as it lives, whichever optimizers there are, inside of what and made when."""
    _listening.append(weakref.ref(listener, _listening.remove))
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_begins))
        _installed.append(register_optimizer_step_post_hook(_ends))


def teller(reference: weakref.ref[Any], what: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    """A hook that tells somebody, while he lives."""

    def hook(*_: Any) -> None:
        listener = reference()
        if listener is not None:
            what(listener, *arguments)

    return hook


def listeners() -> list[Any]:
    """Those that live."""
    return [listener for listener in [reference() for reference in list(_listening)] if listener is not None]


def leave(listener: Listener) -> None:
    """Tell it no more."""
    _listening[:] = [reference for reference in _listening if reference() is not listener]


def check_listens(listener: Listener) -> None:
    """Refuse an exchange whose parameters belong to another one now.

    Raises:
        ConfigurationError: with what to do instead.
    """
    if listener not in listeners():
        raise ConfigurationError(
            "the model has parameters in common with one that was registered after it, and their gradients can be "
            "exchanged for one of the two only: wrap one module that holds both models, or, if the model was wrapped "
            "again, train with the later wrapper"
        )


def _begins(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    for listener in listeners():
        listener.step_begins(optimizer)


def _ends(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    for listener in listeners():
        listener.step_ends(optimizer)
