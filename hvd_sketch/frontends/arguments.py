"""What cannot work among the arguments of `DistributedOptimizer`, told before any communication."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm.hosts import Asked
from hvd_sketch.compatibility import check_momentum
from hvd_sketch.compressors import Compressor, HalfPrecision, NoCompression
from hvd_sketch.error_feedback.anticipate import Anticipate
from hvd_sketch.error_feedback.base import ErrorFeedback
from hvd_sketch.error_feedback.step_ahead import StepAhead
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.schedules.base import AdaptiveSchedule

Average, Sum = 0, 1  # Horovod's own numbers
_OTHER_OPS = {2: "Adasum", 3: "Min", 4: "Max", 5: "Product"}


def check_arguments(
    optimizer: torch.optim.Optimizer, passes: int, op: int, predivide_factor: float, process_set: Any, comm: Any
) -> None:
    """What is wrong with any compression.

    Raises:
        ConfigurationError: naming the argument.
    """
    if type(optimizer).__module__ == "horovod.torch.optimizer":
        raise ConfigurationError("the optimizer is already a DistributedOptimizer; wrap the plain one")
    if process_set is not None and comm is not None:
        raise ConfigurationError("give process_set (of Horovod) or comm (in place of Horovod), not both")
    if passes <= 0:
        raise ConfigurationError(f"backward_passes_per_step must be at least 1, got {passes}")
    if not 0.0 < predivide_factor < math.inf:
        raise ConfigurationError(f"gradient_predivide_factor must be above 0 and finite, got {predivide_factor}")
    if predivide_factor != 1.0 and op != Average:
        raise ConfigurationError("gradient_predivide_factor is supported with op=Average only")


def check_compression(compression: Any, op: int, optimizer: torch.optim.Optimizer) -> None:
    """What is wrong with an exchange of ours.

    Raises:
        ConfigurationError: naming the argument, and what it may be.
    """
    if compression not in (NoCompression, HalfPrecision) and not isinstance(compression, Compressor):
        raise ConfigurationError(
            f"compression={compression!r} is no member of hvd_sketch.Compression: use none, fp16, auto() or another"
        )
    if op not in (Average, Sum):
        name = _OTHER_OPS.get(op, str(op))
        raise ConfigurationError(f"op={name} cannot be combined with compression: only Average and Sum are linear")
    if isinstance(compression, Compressor):
        check_momentum(compression.momentum, optimizer)


def check_hierarchical(asked: Asked, compression: Any, feedback: ErrorFeedback | None) -> Asked:
    """What is asked for; False where it is not possible.

    Raises:
        ConfigurationError: for what is none of `Asked`, and where somebody insists on what is not possible.
    """
    if not isinstance(asked, bool | None) and (type(asked) is not int or asked < 1):
        raise ConfigurationError(f"hierarchical must be True, False, None or a number of ranks, got {asked!r}")
    if isinstance(compression, Compressor) and compression.divides and not isinstance(feedback, StepAhead):
        return asked
    if asked:
        unfit = "StepAhead" if isinstance(feedback, StepAhead) else compression
        raise ConfigurationError(
            f"hierarchical={asked} divides a compressor's exchange of gradients among the ranks of a host, which does "
            f"not work with {unfit}; leave it away"
        )
    return False


def check_delayed(
    optimizer: torch.optim.Optimizer, compression: Any, feedback: ErrorFeedback | None, resync_every: int
) -> None:
    """What is wrong where gradients are one step late.

    Raises:
        ConfigurationError: naming the argument, and what helps.
    """
    schedule = getattr(compression, "schedule", None)
    devices = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    anticipates = feedback is None or (isinstance(feedback, Anticipate) and feedback.second_moments is None)
    problems = {
        f"is for parameters on processors so far, and some are on {max(devices)}; leave it away": devices != {"cpu"},
        f"goes with error_feedback=Anticipate() or None, not with {feedback}": not anticipates,
        "exchanges whole steps: leave buckets at 1": getattr(compression, "buckets", 1) > 1,
        "does not go with a decay below 1, which looks at the learning rate while that changes; leave decay at 1":
            getattr(compression, "decay", 1.0) < 1.0,
        "does not go with a schedule that looks at the learning rate while that changes; give it no learning_rate":
            isinstance(schedule, AdaptiveSchedule) and schedule.looks_outside,
        "does not go with resync_every, which changes parameters while they are used; leave one of them away":
            resync_every > 0,
        "does not go with elastic training, whose ranks come and go with a gradient in flight; leave it away":
            os.environ.get("HOROVOD_ELASTIC") == "1",
    }  # fmt: skip
    for problem, is_there in problems.items():
        if is_there:
            raise ConfigurationError(f"delayed=True {problem}")


def unfit_for_shards(compression: Any, feedback: ErrorFeedback | None, **others: bool) -> dict[str, bool]:
    """Settings that do not go with parameters of which ranks hold shards."""
    return {
        **others,
        "error_feedback=StepAhead": isinstance(feedback, StepAhead),
        "buckets above 1": getattr(compression, "buckets", 1) > 1,
    }


def named_of(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> list[tuple[str, Tensor]]:
    """The optimizer's parameters, each under its first name, or numbered where no names were given.

    Raises:
        ConfigurationError: for pairs that are none, and where parameters lack a name.
    """
    groups = optimizer.param_groups
    if named_parameters is None:
        return [
            (f"allreduce.noname.{i}.{j}", p) for i, group in enumerate(groups) for j, p in enumerate(group["params"])
        ]
    named = list(named_parameters)
    if any(not isinstance(item, tuple) for item in named):
        raise ConfigurationError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()"
        )
    held = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
    known = {id(parameter) for _, parameter in named}
    unnamed = [place for identity, place in held.items() if identity not in known]
    if unnamed:
        raise ConfigurationError(
            f"named_parameters lacks {len(unnamed)} parameters of the optimizer, the first one at (group, index) "
            f"{unnamed[0]}; pass the named_parameters() of every model whose parameters it holds"
        )
    first = {id(parameter): name for name, parameter in reversed(named)}  # of tied ones
    return [(name, parameter) for name, parameter in named if id(parameter) in held and first[id(parameter)] == name]
