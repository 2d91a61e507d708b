"""An exchange over simulated ranks: the arithmetic alone, many steps in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import Exchange
from hvd_sketch.memory import Momentum

UNIT_ROUNDOFF = 2.0**-24
SHAPES: Mapping[str, tuple[int, ...]] = {"a.bias": (40,), "a.weight": (40, 60), "b.norm": (30,), "b.weight": (30, 100)}
"""A model of 5400 compressed and 70 dense coordinates under the default rule."""


class Run(NamedTuple):
    """What one rank saw: the update of every step, shape (steps, total), and its exchange."""

    updates: Tensor
    exchange: Exchange

    @property
    def residual(self) -> Tensor:
        return self.exchange.in_model(self.exchange.memory.residual)


def parameters(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Random gradients with a few large coordinates, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(1.5).exp()


def make(
    compressor: Compressor,
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


def drive(
    comm: Communicator,
    compressor: Compressor,
    gradients: Tensor,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    average: bool = True,
    momentum: Momentum | None = None,
    before_step: Callable[[Exchange, int], None] = lambda exchange, number: None,
) -> Run:
    """One rank's part: exchange its gradients, of shape (steps, total)."""
    exchange = make(compressor, comm, shapes, average=average, momentum=momentum)
    updates = []
    for number, gradient in enumerate(gradients):
        before_step(exchange, number)
        updates.append(step(exchange, gradient))
    return Run(torch.stack(updates), exchange)


def simulate(compressor: Compressor, gradients: Tensor, *args: Any, **keywords: Any) -> list[Run]:
    """Exchange gradients of shape (ranks, steps, total); every rank's run. Further arguments are those of `drive`."""
    return run_in_process(
        len(gradients), lambda comm: drive(comm, compressor, gradients[comm.rank], *args, **keywords)
    )


def lost(gradients: Tensor, updates: Tensor, residuals: Sequence[Tensor]) -> Tensor:
    """What all ranks computed, less what was applied on each and what is kept, for every coordinate, in float64."""
    applied = updates.double().sum(0) * len(residuals)
    return (gradients.double().sum((0, 1)) - applied - torch.stack(list(residuals)).double().sum(0)).abs()


def rounding(gradients: Tensor) -> Tensor:
    """What float32 rounding may lose of each coordinate: a millionth of the sum of magnitudes."""
    return 1e-6 * gradients.double().abs().sum((0, 1))
