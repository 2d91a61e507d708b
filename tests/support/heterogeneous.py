"""Noisy least squares that differ between ranks, and optimizers on simulated ranks that train on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process

SHAPES = {"bias": (50,), "weight": (50, 40)}


class Model(nn.Module):
    """A weight of 2000 compressed coordinates and a bias of 50 dense ones, zero at first."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SHAPES["weight"], dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(SHAPES["bias"], dtype=dtype))


def loss(model: Model, rank: int, step: int) -> Tensor:
    """``sum (p - b_i)^2 / 2`` with b_i far apart between ranks, plus noise of the step."""
    total = torch.zeros((), dtype=model.weight.dtype)
    for seed, parameter in enumerate((model.weight, model.bias)):
        centre = torch.Generator().manual_seed(100 * rank + seed)
        noise = torch.Generator().manual_seed(10_000 + 1000 * step + 10 * rank + seed)
        away = torch.randn(parameter.shape, generator=centre).exp() + 0.3 * torch.randn(
            parameter.shape, generator=noise
        )
        total = total + (parameter - away).square().sum() / 2
    return total


class Seen(NamedTuple):
    """Of one step of one rank: the vector of the model, and whatever the test looks at."""

    model: Tensor
    detail: Any


def vector(model: nn.Module) -> Tensor:
    """Compressed coordinates first, as in the exchange's layout, float64."""
    named = dict(model.named_parameters())
    return torch.cat([named[name].detach().double().reshape(-1) for name in ("weight", "bias")])


def momenta(optimizer: torch.optim.Optimizer, model: Model) -> Tensor:
    """The momentum buffers of a wrapped SGD, in the order of `vector`."""
    return torch.cat([optimizer.state[p]["momentum_buffer"].double().reshape(-1) for p in (model.weight, model.bias)])


def simulate(
    ranks: int,
    steps: int,
    body: Callable[[Communicator, Model], Callable[[int], Any]],
) -> list[list[Seen]]:
    """Every rank calls ``body`` once and what it returned once a step; what was seen, by rank and step."""

    def on_rank(comm: Communicator) -> list[Seen]:
        model = Model()
        step_of = body(comm, model)
        seen = []
        for step in range(steps):
            detail = step_of(step)
            seen.append(Seen(vector(model), detail))
        return seen

    return run_in_process(ranks, on_rank)
