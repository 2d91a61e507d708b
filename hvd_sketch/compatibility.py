"""Which inner optimizers go with which memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.memory import Momentum


def check_momentum(momentum: Momentum | None, optimizer: torch.optim.Optimizer) -> None:
    """Refuse momentum before *and* after the exchange: it would be applied twice.

    Raises:
        ConfigurationError: naming the parameter group.
    """
    if momentum is None:
        return
    for number, group in enumerate(optimizer.param_groups):
        if group.get("momentum") or "betas" in group:
            raise ConfigurationError(
                f"momentum is applied before the exchange (factor {momentum.factor}) and again by parameter group "
                f"{number} of the inner optimizer; use an inner optimizer without momentum"
            )


def correction_of(optimizer: torch.optim.Optimizer, *, masking: bool) -> Momentum:
    """The momentum correction that replaces the momentum of a plain SGD optimizer.

    Raises:
        ConfigurationError: for another optimizer, dampening, or groups of different momentum.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ConfigurationError(
            f"momentum_correction takes over the momentum of torch.optim.SGD, not of {type(optimizer).__name__}"
        )
    settings = {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups}
    if len(settings) > 1:
        raise ConfigurationError(f"momentum_correction needs one momentum for all parameter groups, got {settings}")
    if any(group["dampening"] for group in optimizer.param_groups):
        raise ConfigurationError("momentum_correction does not know dampening; set it to 0")
    factor, nesterov = settings.pop()
    return Momentum(factor, nesterov, masking)


@contextmanager
def without_momentum(optimizer: torch.optim.Optimizer, correction: Momentum | None) -> Iterator[None]:
    """Inside, the optimizer takes plain steps: momentum and weight decay are in the update already."""
    if correction is None:
        yield
        return
    taken_over = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    saved = [{name: group[name] for name in taken_over} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(taken_over)
    try:
        yield
    finally:
        for group, own in zip(optimizer.param_groups, saved, strict=True):
            group.update(own)
