"""What a framework does beside an optimizer that exchanges, where that makes the exchange useless."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Collection

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hvd_sketch.instances import instances_of


def warn_of_what_is_beside(parameters: Collection[Tensor], ranks: int) -> None:
    """Warn where the gradients of so many ranks are the same before they are exchanged.

    Either DistributedDataParallel averages them, or Accelerate, and with it Trainer, knows of one process, and deals
    the same batches to all.
    """
    if ranks == 1:
        return
    if _averaged(parameters, ranks):
        gc.collect()  # a model that is no longer used averages nothing
    if _averaged(parameters, ranks):
        warnings.warn(
            "hvd_sketch: the model is wrapped in DistributedDataParallel, which averages the whole gradients before "
            "DistributedOptimizer exchanges them, so that nothing is saved; leave DistributedOptimizer away and call "
            "hvd_sketch.ddp.register(model, optimizer, compression), or do not wrap the model",
            stacklevel=2,
        )
    if _known_to_accelerate() == 1:
        warnings.warn(
            f"hvd_sketch: Accelerate, on which Trainer builds, knows of one process, and {ranks} exchange: unless the "
            "script deals the samples to them, all train on the same batches; start with torchrun, and call "
            "hvd_sketch.ddp.register in place of DistributedOptimizer",
            stacklevel=2,
        )


def _averaged(parameters: Collection[Tensor], ranks: int) -> bool:
    """Whether a model without a communication hook sums them over as many ranks."""
    held = set(parameters)
    return any(
        not getattr(model, "_comm_hooks", ())
        and model.process_group.size() >= ranks
        and not held.isdisjoint(model.parameters())
        for model in instances_of(DistributedDataParallel)
        if "process_group" in vars(model)  # else it is not complete
    )


def _known_to_accelerate() -> int | None:
    """How many processes there are, as far as it knows; None where it is not in use.

    To ask its `PartialState`, one has to make it, which begins what is not in use.
    """
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    known: int | None = getattr(state, "_shared_state", {}).get("num_processes")
    return known
