"""One stock optimizer and its exchange: from the gradients that Horovod hands over to the updates in their place."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.compatibility import check_momentum
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.gradients import Gradients, shared_state, take_over, watch
from hvd_sketch.exchange.scaling import LossScale
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


class Compressing(Protocol):
    """What is asked of the compressor itself."""

    @property
    def momentum(self) -> Momentum | None: ...

    @property
    def anticipate(self) -> bool | None: ...

    def layout(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Layout: ...

    def exchange(self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device) -> Exchange: ...


class Companion(Protocol):
    """Goes along with the steps of a client."""

    def finish(self) -> None: ...

    def took(self, parameter: Tensor) -> None: ...


Follow = Callable[[Any, Exchange, Mapping[str, Tensor]], Companion | None]
"""Of a client, its exchange and its parameters."""
Accompany = Callable[[Compressing, torch.optim.Optimizer, bool], tuple[Compressing, Follow]]
"""Of a compressor, an optimizer, and whether the ranks are averaged."""


def alone(client: Any, exchange: Exchange, named: Mapping[str, Tensor]) -> None:
    """Nobody goes along."""
    exchange.log.notes.append("error_feedback=None")


_accompany: list[Accompany] = [lambda compressor, optimizer, averages: (compressor, alone)]


def accompany(by: Accompany) -> None:
    """From now on, ask this whether a new client is accompanied, and how its compressor is set then."""
    _accompany.append(by)


@dataclass(eq=False)
class Ticket:
    """A gradient on its way: handed to Horovod as context, given back by ``decompress``.

    Attributes:
        client: whose it is.
        parameter: of which parameter.
        computed: whether backward has just computed it; else Horovod itself looks for gradients, and makes
            one of zeros where there is none.
    """

    client: Client
    parameter: Tensor
    computed: bool
    done: bool = False


class Client:
    """One stock optimizer and its exchange.

    Horovod's class and the one behind it both call the hooks of a step, the first before and the second after
    gradients are synchronized: there, gradients are taken away that are not to be stepped with.
    """

    def __init__(self, compressor: Compressing, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        names: dict[Tensor, str] = optimizer._parameter_names  # type: ignore[attr-defined]
        _check(compressor, optimizer)
        compressor, follow = _accompany[-1](compressor, optimizer, _averages(optimizer))
        self.names = names
        hooked: set[Tensor] = getattr(optimizer, "_requires_update", set())
        self.parameters = {names[p]: p for p in _as_given(optimizer, names) if p.requires_grad or p in hooked}
        self.exchange = _make_exchange(compressor, optimizer, compressor.layout(self.parameters.items()))
        held = weakref.ref(optimizer)
        self.exchange.watch(self.parameters, lambda: getattr(held(), "param_groups", ()))
        self.exchange.log.notes.append("stock Horovod")
        self.gradients = Gradients(self.exchange, self.parameters, sparse_as_dense=False, decay_of=None)
        self.tickets: list[Ticket] = []
        self._order = list(self.parameters.values())
        self._next = 0
        self._scale = LossScale(None)
        self._depth = int(_is_stepping(optimizer))
        self._filled: set[Tensor] = set()
        self._undo: Callable[[], None] | None = None
        self._companion = follow(self, self.exchange, self.parameters)
        # nothing that sends is to be compiled where a script compiles its step
        self.settle = torch.compiler.disable(self._settle)
        watch(self, self._order)
        optimizer.synchronize = _filling(weakref.ref(self), held)  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(_hook_of(weakref.ref(self), 1))
        optimizer.register_step_post_hook(_hook_of(weakref.ref(self), -1))

    def parameter_of(self, gradient: Tensor) -> Tensor | None:
        """Whose ``grad`` this is; they come in nearly the same order in every step."""
        for turn in range(len(self._order)):
            at = (self._next + turn) % len(self._order)
            if self._order[at].grad is gradient:
                self._order[at], self._order[self._next] = self._order[self._next], self._order[at]
                found = self._order[self._next]
                self._next = (self._next + 1) % len(self._order)
                return found
        return None

    def note(self, ticket: Ticket) -> None:
        """A gradient is there; a new one says that what was synchronized before is not stepped with."""
        self.tickets.append(ticket)
        if ticket.computed:
            self._depth = 0
            self._take_back()

    def gradient_computed(self, parameter: Tensor) -> None:
        """Called by backward."""
        if self._companion is not None:
            self._companion.took(parameter)

    def begin_again(self) -> None:
        """Forget a step that was broken off."""
        self.tickets, self._undo, self._depth = [], None, 0
        self._filled.clear()
        self.gradients.forget()

    def present_exchange(self) -> Exchange:
        """The exchange; what was synchronized, and cleared in place of being stepped with, has left no trace in it."""
        if all(parameter.grad is None for parameter in self.gradients.parameters):
            self._take_back()
        return self.exchange

    def shared_state(self) -> dict[str, Any]:
        """Parameters and the optimizer's state, the same on all ranks; not copied."""
        return shared_state(self.gradients.parameters, self.optimizer())

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with another rank's `shared_state`; what is unsent here stays."""
        take_over(state, self.gradients.parameters, self.optimizer())

    def _settle(self) -> None:
        """Exchange the gradients of all open tickets, as they are now, and write the updates into them."""
        tickets, self.tickets = self.tickets, []
        self._next = 0
        if any(ticket.computed for ticket in tickets) or not self._is_synchronized():
            with torch.no_grad():
                self._run(self._filled.union(ticket.parameter for ticket in tickets if not ticket.computed))
        self._filled.clear()
        for ticket in tickets:
            ticket.done = True

    def in_step(self, change: int) -> None:
        """One level deeper in the optimizer's step, or back; at the second one its gradients are final."""
        self._depth += change
        optimizer = self.optimizer()
        if optimizer is not None and (change, self._depth) == (1, 1):
            self._scale.note_step(optimizer, by_hand=self._undo is not None)
        if self._companion is not None:
            self._companion.finish()
        if change < 0 or self._depth < 2:
            return
        self._undo = None
        for position in range(len(self.exchange.layout.slots)) if self.exchange.void else self.exchange.absent:
            parameter = self.gradients.parameters[position]
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad = None

    def fill(self) -> None:
        """Horovod is about to write into gradients: one that was set to None since becomes zeros that do not count."""
        for ticket in self.tickets:
            if ticket.parameter.grad is None:
                ticket.parameter.grad = torch.zeros_like(ticket.parameter)
                self._filled.add(ticket.parameter)

    def _take_back(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _is_synchronized(self) -> bool:
        return bool(getattr(self.optimizer(), "_synchronized", False))

    def _run(self, made: set[Tensor]) -> None:
        """Exchange; of these parameters, a gradient of zeros is none; sparse ones are summed by Horovod itself."""
        if self._companion is not None:
            self._companion.finish()
        self._check_parameters()
        for parameter in self.parameters.values():
            gradient = parameter.grad
            if gradient is not None and (gradient.is_sparse or (parameter in made and not bool(gradient.any()))):
                self.gradients.leave_out(parameter)
        scale = self._scale_of_gradients()
        self._take_back()
        self._undo = None if self._depth else self.exchange.snapshot()
        self.gradients.hand_in(1.0 / scale)
        try:
            self.exchange.run()
        finally:
            self.gradients.forget()
        if self.exchange.void:
            for gradient in self.gradients.there():
                gradient.fill_(math.nan)
        else:
            self.gradients.write(scale)

    def _scale_of_gradients(self) -> float:
        """A scaler that calls the step has unscaled them before, or tells it."""
        optimizer = self.optimizer()
        if optimizer is None:
            return 1.0
        return self._scale.in_step(optimizer) if self._depth else self._scale.by_hand(optimizer)

    def _check_parameters(self) -> None:
        """Those that train must be among those that trained in the first step: Horovod hooks no others."""
        optimizer = self.optimizer()
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]] if optimizer else []
        for parameter in held:
            name = self.names.get(parameter)
            if parameter.requires_grad and name not in self.parameters:
                told = "a parameter" if name is None else f"parameter {name!r}"
                self.exchange.fail_together(
                    f"{told} was added or unfrozen after the optimizer was wrapped; do so on all ranks first, then "
                    "wrap the plain optimizer again"
                )


def _is_stepping(optimizer: torch.optim.Optimizer) -> bool:
    """Whether we are called from its step: a rank whose first batch is missing meets its compressor only there."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "step" and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _filling(client_of: Callable[[], Client | None], optimizer_of: Callable[[], Any]) -> Callable[[], None]:
    """Horovod's ``synchronize`` of an optimizer, by hand or in its step, once there is what it writes into."""

    def synchronize() -> None:
        client, optimizer = client_of(), optimizer_of()
        if client is not None:
            client.fill()
        type(optimizer).synchronize(optimizer)

    return synchronize


def _hook_of(reference: weakref.ref[Client], change: int) -> Callable[..., None]:
    def hook(*arguments: Any) -> None:
        client = reference()
        if client is not None:
            client.in_step(change)

    uncompiled: Callable[..., None] = torch.compiler.disable(hook)
    return uncompiled


def _as_given(optimizer: torch.optim.Optimizer, names: Iterable[Tensor]) -> list[Tensor]:
    """The named parameters in the order of the model, by which buckets are cut; Horovod has them by name."""
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    places = {parameter: place for place, parameter in enumerate(held)}
    return sorted(names, key=lambda parameter: places.get(parameter, len(places)))


def _make_exchange(compressor: Compressing, optimizer: Any, layout: Layout) -> Exchange:
    from hvd_sketch.comm.horovod import HorovodCommunicator

    return compressor.exchange(
        layout,
        HorovodCommunicator(optimizer.process_set),
        average=_averages(optimizer),
        device=next(iter(optimizer._parameter_names)).device,
    )


def _averages(optimizer: Any) -> bool:
    import horovod.torch as hvd

    return bool(optimizer.op == hvd.Average)


def _check(compressor: Compressing, optimizer: Any) -> None:
    import horovod.torch as hvd

    if optimizer.op not in (hvd.Average, hvd.Sum):
        raise ConfigurationError(f"op={optimizer.op} cannot be sketched: only Average and Sum are linear")
    if optimizer.sparse_as_dense:
        raise ConfigurationError(
            "sparse_as_dense=True hides which parameter a gradient belongs to; use hvd_sketch.DistributedOptimizer"
        )
    check_momentum(compressor.momentum, optimizer)
