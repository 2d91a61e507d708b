"""Which inner optimizers, groups and memories go together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def check_steps_once(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that computes several gradients a step.

    Raises:
        ConfigurationError: with the remedy.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(
            "LBFGS evaluates its closure several times a step, and only the first gradient would be exchanged; "
            "use an optimizer that steps once per gradient"
        )


def check_groups(groups: Any) -> None:
    """Horovod's own rules for ``groups``, which a sparse exchange accepts and does not need.

    Raises:
        ConfigurationError: unless it is None, a positive number, or lists of different parameters.
    """
    if isinstance(groups, list):
        members = [parameter for group in groups for parameter in (group if isinstance(group, list) else [None])]
        if not all(isinstance(parameter, torch.Tensor) for parameter in members):
            raise ConfigurationError("groups must be a list of lists of parameters")
        if len({id(parameter) for parameter in members}) < len(members):
            raise ConfigurationError("groups: a parameter can be in one group only")
    elif groups is not None and not (isinstance(groups, int) and groups > 0):
        raise ConfigurationError(f"groups must be a number above 0 or a list of lists of parameters, got {groups!r}")


def correction_of(optimizer: torch.optim.Optimizer, *, masking: bool) -> Momentum:
    """The momentum correction that replaces the momentum of a plain SGD optimizer.

    Raises:
        ConfigurationError: for another optimizer, dampening, maximize, or groups of different momentum.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ConfigurationError(
            f"momentum_correction takes over the momentum of torch.optim.SGD, not of {type(optimizer).__name__}"
        )
    settings = {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups}
    if len(settings) > 1:
        raise ConfigurationError(f"momentum_correction needs one momentum for all parameter groups, got {settings}")
    for setting in ("dampening", "maximize"):
        if any(group[setting] for group in optimizer.param_groups):
            raise ConfigurationError(f"momentum_correction does not know {setting}; leave it off")
    factor, nesterov = settings.pop()
    return Momentum(factor, nesterov, masking)


@contextmanager
def without_momentum(optimizer: torch.optim.Optimizer, correction: Momentum | None) -> Iterator[None]:
    """Inside, the optimizer takes plain steps: momentum and weight decay are in the update already.

    Raises:
        ConfigurationError: when a scheduler or a loaded state has changed the momentum.
    """
    if correction is None:
        yield
        return
    for number, group in enumerate(optimizer.param_groups):
        if group["momentum"] != correction.factor:
            raise ConfigurationError(
                f"parameter group {number} now has momentum {group['momentum']}, but momentum_correction took over "
                f"{correction.factor} for good; use a schedule with cycle_momentum=False, or wrap the optimizer again"
            )
    taken_over = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    saved = [{name: group[name] for name in taken_over} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(taken_over)
    try:
        yield
    finally:
        for group, own in zip(optimizer.param_groups, saved, strict=True):
            group.update(own)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What it steps, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def parameters_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimizer steps for its state alone: what it does to parameters is taken back."""
    parameters = parameters_of(optimizer)
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
