"""Decentralised momentum SGD and DecentLaM, synchronous, on any graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_sketch.methods.gossip.base import Gossip, check_sgd, nonzero_rate


class DmSGD(Gossip):
    """Decentralised momentum SGD: a local step, then the weighted mean with the neighbours::

        m_i <- beta m_i + g_i              x_i <- sum_j a_ij (x_j - lr m_j)

    Any optimizer can take the local step. On heterogeneous data the fixed point is off the
    optimum, by as much as that of plain decentralised SGD with learning rate lr / (1 - beta).
    A step that makes a parameter not finite is undone and the optimizer's state cleared, so
    nothing such is sent; ``stats.skipped`` counts them.

    Sent: the parameters (float32, or float64 when any is) to every neighbour, every step.
    Source: the baseline of Yuan et al., "DecentLaM" (ICCV 2021), arXiv 2104.11981.

    Args:
        optimizer: ``torch.optim.SGD`` with momentum gives the equations above.
        model: what it trains.
        comm: an mpi4py communicator or one of ours; Horovod where it is installed if None.
        graph: complete, ring, torus, hypercube, or a networkx graph over the ranks; the weights
            are Metropolis's.
        same_start: begin with rank 0's parameters and saved buffers on every rank.

    Raises:
        ConfigurationError: see `hvd_sketch.methods.decentralized.Decentralized` and `graph_of`.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        graph: Any = "ring",
        *,
        same_start: bool = True,
    ) -> None:
        super().__init__(optimizer, model, comm, graph, lazy=False, same_start=same_start)
        self._before = self._flat.new()

    def advance(self, **keywords: Any) -> None:
        self._flat.read(self._before)
        self.optimizer.step(**keywords)
        self._flat.read(self._live)
        if not math.isfinite(torch.linalg.vector_norm(self._live.vector, math.inf)):
            self._live.vector.copy_(self._before.vector)
            self.optimizer.state.clear()
            self.stats.skipped += 1
        self._mix(self._live.vector)
        self._flat.write(self._live)


class DecentLaM(Gossip):
    """Decentralised SGD whose momentum includes what the mixing corrects::

        z_i = x_i - lr g_i                 g~_i = (x_i - sum_j a_ij z_j) / lr
        m_i <- beta m_i + g~_i             x_i <- x_i - lr m_i

    Its bias on heterogeneous data is that of decentralised SGD without momentum on the same weights,
    whatever beta. Weight decay is part of g. A gradient that is not finite counts as zero, and in ``stats.skipped``.

    Sent: z (float32, or float64 when any parameter is) to every neighbour, every step.
    Source: Yuan et al., "DecentLaM" (ICCV 2021), arXiv 2104.11981.

    Args:
        optimizer: a ``torch.optim.SGD`` with momentum.
        model: what it trains.
        comm: an mpi4py communicator or one of ours; Horovod where it is installed if None.
        graph: complete, ring, torus, hypercube, or a networkx graph over the ranks; the weights
            are ``(I + A) / 2`` with Metropolis's A: positive definite, as the method needs.
        same_start: begin with rank 0's parameters and saved buffers on every rank.

    Raises:
        ConfigurationError: for another optimizer; see also `DmSGD`. In `step`, for a learning
            rate of 0, by which the method would divide.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        graph: Any = "ring",
        *,
        same_start: bool = True,
    ) -> None:
        check_sgd(optimizer, self._method)
        super().__init__(optimizer, model, comm, graph, lazy=True, same_start=same_start)
        self._mixed, self._gradient = self._flat.new(), self._flat.new()

    def advance(self, **keywords: Any) -> None:
        self._flat.read(self._live)
        self._read_gradient(self._gradient)
        self._mixed.vector.copy_(self._live.vector)
        for rate, positions in self._rates():
            gradients = [self._gradient.views[position] for position in positions]
            torch._foreach_add_([self._mixed.views[position] for position in positions], gradients, alpha=-rate)
        self._mix(self._mixed.vector)
        torch.sub(self._live.vector, self._mixed.vector, out=self._gradient.vector)
        for rate, positions in self._rates():
            torch._foreach_div_([self._gradient.views[position] for position in positions], rate)
        self._flat.write_gradients(self._gradient)
        with _without_weight_decay(self.optimizer):
            self.optimizer.step(**keywords)

    def _rates(self) -> list[tuple[float, list[int]]]:
        return [(nonzero_rate(g), at) for g, at in zip(self.param_groups, self._flat.groups, strict=True) if at]


@contextmanager
def _without_weight_decay(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    saved = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, weight_decay in zip(optimizer.param_groups, saved, strict=True):
            group["weight_decay"] = weight_decay
