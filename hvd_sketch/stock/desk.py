"""The two calls of Horovod, and whose gradients they bring."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.instances import instances_of
from hvd_sketch.stock.client import Client, Compressing, Ticket


class _Desk:
    """The optimizers that use one compressor."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.clients: list[Client] = []

    def note(self, compressor: Compressing, gradient: Tensor) -> Ticket:
        """The ticket of a gradient.

        Raises:
            ConfigurationError: when it is no parameter's.
        """
        with self.lock:
            self.clients = [client for client in self.clients if client.optimizer() is not None]
            for look in (False, True):
                if look:
                    self._find_clients(compressor)
                for client in self.clients:
                    parameter = client.parameter_of(gradient)
                    if parameter is not None:
                        in_backward = torch._C._current_graph_task_id() >= 0
                        ticket = Ticket(client, parameter, in_backward)
                        client.note(ticket)
                        return ticket
        raise ConfigurationError(
            "a tensor that is no parameter's gradient was given to a sparsifying compressor; "
            "give hvd.allreduce and hvd.reducescatter Compression.none or fp16"
        )

    def _find_clients(self, compressor: Compressing) -> None:
        known = {id(client.optimizer()) for client in self.clients}
        for candidate in instances_of(torch.optim.Optimizer):
            if vars(candidate).get("_compression") is compressor and id(candidate) not in known:
                self.clients.append(Client(compressor, candidate))
        if not self.clients:
            raise ConfigurationError(
                "a sparsifying compressor works only inside horovod.torch.DistributedOptimizer, where it can tell "
                "which parameter a gradient belongs to; give hvd.allreduce Compression.none or fp16"
            )


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
    """Return the gradient of the parameter that `compress` was given one of, by now holding the update of all ranks.

    A sparse gradient, which Horovod sums by itself and never compresses, comes without a
    ticket and is returned as it is.
    """
    if ticket is None:
        return tensor
    if not ticket.done:
        ticket.client.settle()
    gradient = ticket.parameter.grad
    assert gradient is not None
    return gradient


def client_of(compressor: Compressing, optimizer: torch.optim.Optimizer) -> Client:
    """The client of a stock optimizer that has this compressor, made if there is none yet."""
    desk = _desks.setdefault(compressor, _Desk())
    with desk.lock:
        for client in desk.clients:
            if client.optimizer() is optimizer:
                return client
        desk.clients.append(Client(compressor, optimizer))
        return desk.clients[-1]


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
