"""An exchange over simulated ranks: the arithmetic alone, many steps in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compression import Sparsifier
from hvd_sketch.exchange import Exchange
from hvd_sketch.memory import Momentum

UNIT_ROUNDOFF = 2.0**-24
HALF_ROUNDOFF = 2.0**-11
SHAPES: Mapping[str, tuple[int, ...]] = {"a.bias": (40,), "a.weight": (40, 60), "b.norm": (30,), "b.weight": (30, 100)}
"""A model of 5400 compressed and 70 dense coordinates under the default rule."""


class Run(NamedTuple):
    """What one rank saw: the update of every step, shape (steps, total), and its exchange."""

    updates: Tensor
    exchange: Exchange

    @property
    def residual(self) -> Tensor:
        return self.exchange.memory.residual


def parameters(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Random gradients with a few large coordinates, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(1.5).exp()


def make(
    compressor: Sparsifier,
    comm: Communicator,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    average: bool = True,
    momentum: Momentum | None = None,
) -> Exchange:
    layout = compressor.layout(parameters(shapes).items())
    return compressor.exchange(layout, comm, average=average, device=torch.device("cpu"), momentum=momentum)


def submit(exchange: Exchange, gradient: Tensor) -> None:
    """Hand in a flat gradient, in the order of the layout, one slot after the other."""
    for position, slot in enumerate(exchange.layout.slots):
        exchange.submit(position, gradient[slot.offset : slot.stop].view(slot.shape))


def step(exchange: Exchange, gradient: Tensor) -> Tensor:
    """One exchange; the whole update."""
    submit(exchange, gradient)
    exchange.run()
    return exchange.update.clone()


def simulate(
    compressor: Sparsifier,
    gradients: Tensor,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    average: bool = True,
    momentum: Momentum | None = None,
    before_step: Callable[[Exchange, int], None] = lambda exchange, number: None,
) -> list[Run]:
    """Exchange the given gradients, of shape (ranks, steps, total), and return every rank's run."""

    def body(comm: Communicator) -> Run:
        exchange = make(compressor, comm, shapes, average=average, momentum=momentum)
        updates = []
        for number, gradient in enumerate(gradients[comm.rank]):
            before_step(exchange, number)
            updates.append(step(exchange, gradient))
        return Run(torch.stack(updates), exchange)

    return run_in_process(len(gradients), body)
