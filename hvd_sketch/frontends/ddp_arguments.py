"""What `State` is given, and what of it cannot work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hvd_sketch.compatibility import check_momentum, check_steps_once, parameters_of
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.base import ErrorFeedback
from hvd_sketch.error_feedback.default import Default, settle
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.instances import instances_of
from hvd_sketch.methods.wrapper import HOROVODS_MODULE


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The one that frameworks, and optimizers that are none of PyTorch's making, put their own around.

    Raises:
        ConfigurationError: for one that exchanges by itself.
    """
    if type(optimizer).__module__ == HOROVODS_MODULE:
        raise ConfigurationError(
            "the optimizer is a DistributedOptimizer, which exchanges by itself; give the plain one to the hook, or "
            "leave DistributedDataParallel away"
        )
    inside = [getattr(optimizer, "optimizer", None)]
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # PyTorch's own initialisation makes them
        inside += vars(optimizer).values()
    inner = next((each for each in inside if isinstance(each, torch.optim.Optimizer)), None)
    return optimizer if inner is None else innermost(inner)


def check(compression: Any, optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> None:
    """What is wrong with a compressor and an optimizer of these parameters.

    Raises:
        ConfigurationError: with the remedy.
    """
    if not isinstance(compression, Compressor):
        raise ConfigurationError(
            f"compression={compression!r} is none that sparsifies: use hvd_sketch.Compression.auto() or another; for "
            "plain averages register no hook, and for half precision PyTorch's own fp16_compress_hook"
        )
    check_steps_once(optimizer)
    check_momentum(compression.momentum, optimizer)
    if trained and set(trained.values()).isdisjoint(parameters_of(optimizer)):
        raise ConfigurationError("the optimizer holds none of the model's parameters; give the one that steps them")
    wrappers = _wrappers_of(trained)
    if wrappers and all(map(_brings_a_hook, wrappers)):  # else the model was wrapped again
        check_wrapping(wrappers[0])


def frozen_of(named: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that are not trained, of those named and of the model that was wrapped."""
    frozen = {name: parameter for name, parameter in named.items() if name not in trained}
    for model in _wrappers_of(trained):
        inside = model.module.named_parameters()
        frozen.update(
            (name, p) for name, p in inside if not p.requires_grad and name not in model.parameters_to_ignore
        )
    return frozen


def _wrappers_of(trained: Mapping[str, Tensor]) -> list[DistributedDataParallel]:
    parameters = set(trained.values())
    return [each for each in wrapped_models() if not parameters.isdisjoint(each.module.parameters())]


def wrapped_models() -> list[DistributedDataParallel]:
    """All that there are and whose making did not fail."""
    return [each for each in instances_of(DistributedDataParallel) if hasattr(each, "reducer")]


def check_wrapping(model: DistributedDataParallel) -> None:
    """Refuse a model that brings, or will bring, a communication hook of its own.

    Raises:
        ConfigurationError: with what to leave away.
    """
    what = _brings_a_hook(model)
    if what:
        raise ConfigurationError(f"the model was wrapped with {what}, and wrap it again")


def _brings_a_hook(model: DistributedDataParallel) -> str:
    """What it was wrapped with, and the remedy; empty if it leaves the place to others."""
    if model.mixed_precision is not None:
        return "mixed_precision=, which averages by a hook of its own; use torch.autocast"
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in model.module.parameters()):
        return "an optimizer that steps inside of backward, by a hook of its own; let it step after backward"
    if getattr(model, "_use_python_reducer", False):
        return "torch._dynamo.config.optimize_ddp='python_reducer', which compiles hooks; leave that setting away"
    return ""


def settled(
    compression: Compressor, optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]
) -> tuple[Compressor, ErrorFeedback | None]:
    """See `settle`; nothing is anticipated unless the optimizer holds all parameters.

    Raises:
        ConfigurationError: when a compressor demands what is not possible.
    """
    held = set(parameters_of(optimizer))
    foreign = [name for name, parameter in trained.items() if parameter not in held]
    if foreign and compression.anticipate:
        raise ConfigurationError(
            f"anticipate=True needs one optimizer of all parameters, and this one does not hold {foreign[0]!r}; "
            "leave anticipate away to have it where possible"
        )
    asked = None if foreign else Default.OF_COMPRESSION
    return settle(compression, optimizer, asked, averages=True, corrects=False)


def numbered(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """An optimizer's parameters, by group and number."""
    for i, group in enumerate(optimizer.param_groups):
        yield from ((f"{i}.{j:04d}", parameter) for j, parameter in enumerate(group["params"]))
