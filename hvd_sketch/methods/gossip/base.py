"""Synchronous methods on a graph: every step, every rank talks to its neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator, as_communicator, default_communicator
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.log import MethodLog
from hvd_sketch.methods.decentralized import Decentralized
from hvd_sketch.methods.flat import Flat
from hvd_sketch.methods.gossip.neighbours import Neighbourhood
from hvd_sketch.methods.graphs import graph_of

_NO_SETTINGS: Mapping[str, str] = {}


class Gossip(Decentralized):
    """A method whose every step mixes a vector with the neighbours' by the graph's weights.

    Args:
        graph: a name, a networkx graph or a `hvd_sketch.methods.graphs.Graph`.
        comm: an mpi4py communicator or a `Communicator`; Horovod where it is installed if None.
        lazy: weights ``(I + A) / 2`` in place of the Metropolis weights A.
        settings: what else must be equal on all ranks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any,
        graph: Any,
        *,
        lazy: bool,
        same_start: bool,
        settings: Mapping[str, str] = _NO_SETTINGS,
    ) -> None:
        collectives = default_communicator() if comm is None else as_communicator(comm)
        self.graph = graph_of(graph, collectives.size)
        agreed = {"graph": str(self.graph.neighbours), **settings}
        super().__init__(optimizer, model, collectives, agreed, same_start=same_start)
        self._log = MethodLog(f"{self._method} with {max(map(len, self.graph.neighbours))} neighbours at most")
        mpi_comm = None if isinstance(comm, Communicator) else comm
        self._neighbourhood = Neighbourhood(collectives, mpi_comm, self.graph)
        row = self.graph.mixing(lazy=lazy)[collectives.rank].tolist()
        self._own_weight: float = row[collectives.rank]
        self._weights: list[float] = [row[other] for other in self.graph.neighbours[collectives.rank]]

    def _mix(self, vector: Tensor) -> None:
        """Replace ``vector`` by ``sum_j a_ij vector_j``; sends it whole to every neighbour."""
        rows = self._exchange(vector)
        vector.mul_(self._own_weight)
        for weight, row in zip(self._weights, rows, strict=True):
            vector.add_(row, alpha=weight)

    def _exchange(self, message: Tensor) -> Tensor:
        """Send to every neighbour; returns their messages, a row each."""
        with self.stats.phase("exchange"):
            rows = self._neighbourhood.exchange(message, "hvd_sketch.gossip")
        self.stats.bytes_sent = self._neighbourhood.bytes_sent
        return rows

    def _read_gradient(self, into: Flat) -> None:
        """This step's gradient plus weight decay; zero if not finite, so that nothing such is sent.

        `_live` must hold the parameters.
        """
        self._flat.read_gradients(into)
        for group, positions in zip(self.param_groups, self._flat.groups, strict=True):
            if group["weight_decay"]:
                gradients, values = [into.views[p] for p in positions], [self._live.views[p] for p in positions]
                torch._foreach_add_(gradients, values, alpha=group["weight_decay"])
        if not math.isfinite(torch.linalg.vector_norm(into.vector, math.inf)):
            into.vector.zero_()
            self.stats.skipped += 1


def check_sgd(optimizer: torch.optim.Optimizer, method: str) -> None:
    """Refuse anything but a ``torch.optim.SGD`` that minimises.

    Raises:
        ConfigurationError: naming the method.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ConfigurationError(f"{method} corrects the steps of torch.optim.SGD, not of {type(optimizer).__name__}")
    if any(group["maximize"] for group in optimizer.param_groups):
        raise ConfigurationError(f"{method} minimises; negate the loss instead of maximize=True")


def nonzero_rate(group: dict[str, Any]) -> float:
    """A parameter group's learning rate.

    Raises:
        ConfigurationError: when it is not positive, since it is divided by.
    """
    rate = float(group["lr"])
    if not rate > 0.0:
        raise ConfigurationError(
            f"the method divides by the learning rate, which is {rate}; keep the schedule above 0"
        )
    return rate
