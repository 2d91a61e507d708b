"""The way in for DistributedDataParallel: its communication hook hands the gradients to an exchange."""

# without postponed annotations: DistributedDataParallel compares those of a hook

from dataclasses import replace
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed's own, which it does not export to type checkers
from torch.nn.parallel import DistributedDataParallel

from hvd_sketch.comm.hosts import Asked
from hvd_sketch.comm.launcher import launched
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.ahead import AheadOptimizer
from hvd_sketch.error_feedback.base import ErrorFeedback
from hvd_sketch.error_feedback.default import Default
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.frontends.ddp_arguments import check_wrapping, wrapped_models
from hvd_sketch.frontends.ddp_state import State
from hvd_sketch.frontends.optimizer import DistributedOptimizer


def hook(state: State, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: ``model.register_comm_hook(State(compression, optimizer), hook)``."""
    return state.receive(bucket)


def keep_local(state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook that leaves every rank its own gradients, for an optimizer that exchanges."""
    future = torch.futures.Future[Tensor]()
    future.set_result(bucket.buffer())
    return future


@overload
def register(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    compression: Compressor,
    *,
    error_feedback: Default | None = ...,
    grad_scaler: torch.amp.GradScaler | None = None,
    hierarchical: Asked = None,
) -> State: ...


@overload
def register(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    compression: Compressor,
    *,
    error_feedback: ErrorFeedback,
    grad_scaler: torch.amp.GradScaler | None = None,
    hierarchical: Asked = None,
) -> AheadOptimizer: ...


def register(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    compression: Compressor,
    *,
    error_feedback: ErrorFeedback | Default | None = Default.OF_COMPRESSION,
    grad_scaler: torch.amp.GradScaler | None = None,
    hierarchical: Asked = None,
) -> State | AheadOptimizer:
    """Let a DistributedDataParallel model exchange its gradients by a compressor.

    The script goes on as it is, with its own optimizer. Given an ``error_feedback``, go on with the optimizer that
    is returned: gradients then stay each rank's own, and it is its `step` that exchanges.

    Args:
        model: the DistributedDataParallel model, compiled or not, or what a framework has put around it.
        optimizer: the one that steps its parameters.
        compression: one of `hvd_sketch.Compression` that sparsifies.
        error_feedback: `Anticipate` or `StepAhead` with settings of their own; by default the compressor's, and none
            with None.
        grad_scaler: the scaler in use, if there are several in the process.
        hierarchical: as for `hvd_sketch.DistributedOptimizer`.

    Returns:
        the state of the hook, or the optimizer to train with; both have ``exchange`` (with its ``stats``), ``flush``,
        ``memory_state_dict`` and ``load_memory_state_dict``.

    Raises:
        ConfigurationError: for another model, or settings that cannot work, before any communication.
    """
    model = _distributed(model)
    if not isinstance(model, DistributedDataParallel):
        raise ConfigurationError(
            f"register needs a torch.nn.parallel.DistributedDataParallel model, got {type(model).__name__}; wrap it "
            "first, or use hvd_sketch.DistributedOptimizer, which needs none"
            f"{_of_the_wrapper(model)}{_of_the_launcher()}"
        )
    _check_hooks(model)
    named = {name: p for name, p in model.module.named_parameters() if name not in model.parameters_to_ignore}
    if error_feedback is None and isinstance(compression, Compressor):
        compression = replace(compression, anticipate=False)
    if error_feedback is None or isinstance(error_feedback, Default):
        group = model.process_group
        state = State(
            compression,
            optimizer,
            named.items(),
            process_group=group,
            grad_scaler=grad_scaler,
            hierarchical=hierarchical,
        )
        model.register_comm_hook(state, hook)
        return state
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    foreign = [name for name, parameter in named.items() if parameter.requires_grad and parameter not in held]
    if foreign:
        raise ConfigurationError(
            f"error_feedback exchanges the steps of one optimizer, which does not hold {foreign[0]!r}; give it all "
            "parameters of the model that require a gradient"
        )
    ahead = DistributedOptimizer(
        optimizer,
        named.items(),
        compression,
        comm=model.process_group,
        grad_scaler=grad_scaler,
        error_feedback=error_feedback,
        hierarchical=hierarchical,
    )
    model.register_comm_hook(None, keep_local)
    return ahead


def _distributed(model: torch.nn.Module) -> torch.nn.Module:
    """The DistributedDataParallel model that torch.compile, or a framework, has put its own around; else itself."""
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    inner = next((part for part in parts if isinstance(part, DistributedDataParallel)), model)
    return inner if inner is model or set(inner.parameters()) == set(model.parameters()) else model


def _check_hooks(model: DistributedDataParallel) -> None:
    """Refuse a second hook before the first one's state is replaced, and a model that brings or will bring its own."""
    check_wrapping(model)
    for registered, state in getattr(model, "_comm_hooks", ()):
        if registered is not hook or state is not None:  # else it was left behind, and this is a copy
            name = getattr(registered, "__qualname__", repr(registered))
            raise ConfigurationError(
                f"the model has a communication hook already, {name!r}, and can have one only: go on with what "
                "register has returned, as in a second fit of one model, or wrap model.module in "
                "DistributedDataParallel again, and register once"
            )


def _of_the_wrapper(model: torch.nn.Module) -> str:
    """Where to find the one that there is already, for a framework hands out the model inside."""
    if not any(each.module is model for each in wrapped_models()):
        return ""
    return (
        ". This model is wrapped already: give what wraps it, which is trainer.model_wrapped of Transformers, "
        "trainer.strategy.model of Lightning, and what accelerator.prepare returns"
    )


def _of_the_launcher() -> str:
    """What to know of frameworks that wrap the model, under a launcher that torch.distributed does not know."""
    count, says = launched()
    if count == 1 or dist.is_initialized():
        return ""
    return (
        f". {says} has started {count} processes, and torch.distributed connects none of them: in each, Trainer, "
        "Accelerate and Lightning train on the same batches; start with torchrun"
    )
