"""A small model, its data, and a training loop for the tests of optimizers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COMPRESSED, TOTAL = 4200, 4300
_DRAWING = threading.Lock()  # the generator that layers draw from is the process's


def net(seed: int = 0) -> nn.Sequential:
    """4200 compressed and 100 dense parameters under the default rule, equal for equal seeds; from any thread."""
    with _DRAWING, torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 40))


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    """The loss on one rank's batch of one step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    device = next(model.parameters()).device
    inputs, targets = (torch.randn(16, features, generator=generator).to(device) for features in (30, 40))
    return nn.functional.mse_loss(model(inputs), targets)


def train(
    optimizer: Any,
    model: nn.Module,
    steps: int | range,
    rank: int = 0,
    after_backward: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Plain steps; the parameters at the end, as one vector."""
    for step in steps if isinstance(steps, range) else range(steps):
        optimizer.zero_grad()
        loss(model, rank, step).backward()
        after_backward(step)
        optimizer.step()
    return flat(model)


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).clone()


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat(
        [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in model.parameters()]
    )
