"""The full exchange behind the two calls that *stock* Horovod makes for each gradient.

Horovod calls ``compress(gradient)`` for every parameter as its gradient gets ready, and
``decompress(reduced, ctx)`` for every parameter afterwards, each rank in an order of its own,
and tells neither the parameter nor the step. A collective inside ``decompress`` would wait for
a rank that waits for another one. So ``compress`` only notes the gradient and hands Horovod a
token of one element; every ``compress`` of a step precedes every ``decompress`` on every rank,
so the first ``decompress`` runs the whole exchange, in the order of names, and writes all
updates into the gradients themselves; the others have nothing left to do.

Which parameter a gradient belongs to is known by identity: what arrives is ``p.grad`` itself.
The optimizer is the one that holds this compressor, found once among the live objects.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.layout import Layout, describe_values
from hvd_sketch.memory import Momentum


class Compressing(Protocol):
    """What is asked of the compressor itself."""

    @property
    def momentum(self) -> Momentum | None: ...

    def layout(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Layout: ...

    def exchange(self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device) -> Exchange: ...


@dataclass(eq=False)
class Ticket:
    """A gradient on its way: handed to Horovod as context, given back by ``decompress``."""

    gradient: Tensor
    done: bool = False


class _Client:
    """One stock optimizer and its exchange."""

    def __init__(self, compressor: Compressing, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        names: dict[Tensor, str] = optimizer._parameter_names  # type: ignore[attr-defined]
        _check(compressor, optimizer)
        self.names = names
        self.parameters = {name: parameter for parameter, name in names.items() if parameter.requires_grad}
        layout = compressor.layout(self.parameters.items())
        self.positions = layout.index()
        self.exchange = _make_exchange(compressor, optimizer, layout)
        self.exchange.describe_values = partial(describe_values, self.parameters)

    def gradients(self) -> Iterator[tuple[int, int]]:
        """(identity of the gradient, position in the layout) of every parameter that has one."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                yield id(parameter.grad), self.positions[name]

    def check_parameters(self) -> None:
        """Those that train must be those that trained in the first step: Horovod hooks no others."""
        optimizer = self.optimizer()
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]] if optimizer else []
        for parameter in held:
            name = self.names.get(parameter, "of a group added later")
            if parameter.requires_grad != (name in self.parameters):
                self.exchange.fail_together(
                    f"parameter {name!r} was added, frozen or unfrozen after the optimizer was wrapped; do so on all "
                    "ranks first, then wrap the plain optimizer again"
                )

    def run(self, tickets: list[Ticket], where: dict[int, int]) -> None:
        """Exchange the gradients of these tickets and write the updates into them."""
        gradients = [ticket.gradient for ticket in tickets]
        positions = [where[id(gradient)] for gradient in gradients]
        if not self._settled(gradients, positions):
            self.check_parameters()
            for position, gradient in zip(positions, gradients, strict=True):
                self.exchange.submit(position, gradient)
            self.exchange.run()
            self.exchange.write_update(dict(zip(positions, gradients, strict=True)))
        for ticket in tickets:
            ticket.done = True

    def _settled(self, gradients: list[Tensor], positions: list[int]) -> bool:
        """Whether these are the last step's updates, which ``step`` after ``synchronize`` brings again."""
        synchronized = getattr(self.optimizer(), "_synchronized", False)
        pairs = zip(gradients, positions, strict=True)
        return synchronized and all(torch.equal(g, self.exchange.update_of(p).to(g.dtype)) for g, p in pairs)


class _Desk:
    """The open tickets of one compressor, and the optimizers that use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.clients: list[_Client] = []
        self.tickets: list[Ticket] = []

    def note(self, compressor: Compressing, gradient: Tensor) -> Ticket:
        with self.lock:
            if not self.clients:
                self.find_clients(compressor)
            ticket = Ticket(gradient)
            self.tickets.append(ticket)
            return ticket

    def find_clients(self, compressor: Compressing) -> None:
        known = {id(client.optimizer()) for client in self.clients}
        for candidate in gc.get_objects():
            if (
                issubclass(type(candidate), torch.optim.Optimizer)
                and vars(candidate).get("_compression") is compressor
                and id(candidate) not in known
            ):
                self.clients.append(_Client(compressor, candidate))
        if not self.clients:
            raise ConfigurationError(
                "a sparsifying compressor works only inside horovod.torch.DistributedOptimizer, where it can tell "
                "which parameter a gradient belongs to; give hvd.allreduce Compression.none or fp16"
            )

    def settle(self, compressor: Compressing, ticket: Ticket) -> None:
        """Run the exchange of the optimizer this ticket belongs to, for all its open tickets."""
        with self.lock:
            self.clients = [client for client in self.clients if client.optimizer() is not None]
            client = self._owner(ticket)
            if client is None:
                self.find_clients(compressor)
                client = self._owner(ticket)
            if client is None:
                self.tickets.remove(ticket)
                raise ConfigurationError(
                    "a tensor that is no parameter's gradient was given to a sparsifying compressor; "
                    "give hvd.allreduce and hvd.reducescatter Compression.none or fp16"
                )
            where = dict(client.gradients())
            mine = [open_ticket for open_ticket in self.tickets if id(open_ticket.gradient) in where]
            self.tickets = [open_ticket for open_ticket in self.tickets if id(open_ticket.gradient) not in where]
        client.run(mine, where)

    def _owner(self, ticket: Ticket) -> _Client | None:
        for client in self.clients:
            if any(identity == id(ticket.gradient) for identity, _ in client.gradients()):
                return client
        return None


_desks: weakref.WeakKeyDictionary[Compressing, _Desk] = weakref.WeakKeyDictionary()


def compress(compressor: Compressing, tensor: Tensor) -> tuple[Tensor, Ticket]:
    """Note a gradient; return a one-element token for Horovod to reduce, and the ticket.

    Raises:
        ConfigurationError: outside a DistributedOptimizer, or with settings that cannot work.
    """
    if isinstance(tensor, torch.nn.Parameter):
        raise ConfigurationError(
            "a parameter itself was given to a sparsifying compressor, as op=Adasum does; use op=Average or Sum, and "
            "give hvd.allreduce Compression.none or fp16"
        )
    ticket = _desks.setdefault(compressor, _Desk()).note(compressor, tensor)
    return torch.zeros(1, dtype=torch.float32, device=tensor.device), ticket


def decompress(compressor: Compressing, tensor: Tensor, ticket: Ticket | None) -> Tensor:
    """Return the gradient that `compress` was given, by now holding the update of all ranks.

    A sparse gradient, which Horovod sums by itself and never compresses, comes without a
    ticket and is returned as it is.
    """
    if ticket is None:
        return tensor
    if not ticket.done:
        _desks[compressor].settle(compressor, ticket)
    return ticket.gradient


def exchange_of(compressor: Compressing) -> Exchange:
    """The exchange behind a compressor in stock Horovod, for its `stats`, `flush` and state.

    Raises:
        ConfigurationError: before the first step, or when several optimizers share the compressor.
    """
    desk = _desks.get(compressor)
    if desk is None or len(desk.clients) != 1:
        raise ConfigurationError(
            "the exchange exists from the first step on, and only for a compressor that one optimizer uses"
        )
    return desk.clients[0].exchange


def _make_exchange(compressor: Compressing, optimizer: Any, layout: Layout) -> Exchange:
    import horovod.torch as hvd

    from hvd_sketch.comm.horovod import HorovodCommunicator

    return compressor.exchange(
        layout,
        HorovodCommunicator(optimizer.process_set),
        average=optimizer.op == hvd.Average,
        device=next(iter(optimizer._parameter_names)).device,
    )


def _check(compressor: Compressing, optimizer: Any) -> None:
    import horovod.torch as hvd

    from hvd_sketch.compatibility import check_momentum

    if optimizer.op not in (hvd.Average, hvd.Sum):
        raise ConfigurationError(f"op={optimizer.op} cannot be sketched: only Average and Sum are linear")
    if optimizer.sparse_as_dense:
        raise ConfigurationError(
            "sparse_as_dense=True hides which parameter a gradient belongs to; use hvd_sketch.DistributedOptimizer"
        )
    check_momentum(compressor.momentum, optimizer)
