"""What Horovod has as well, for parameters that it does not send: of bfloat16, bool, complex, not contiguous."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import horovod.torch as hvd
import torch

from hvd_sketch.comm import default_communicator
from hvd_sketch.comm.horovod import CARRIED, as_carried
from hvd_sketch.comm.states import broadcast_state
from hvd_sketch.frontends.world import tensors_of

__all__ = ["broadcast_optimizer_state", "broadcast_parameters"]


def broadcast_parameters(params: Mapping[str, Any] | Iterable[Any], root_rank: int = 0) -> None:
    """Overwrite parameters and buffers by the root's: a ``state_dict()``, named parameters, or parameters alone.

    Raises:
        ConfigurationError: for a DTensor.
    """
    named = tensors_of(params)
    values = [tensor.detach().contiguous() for _, tensor in named]
    hvd.broadcast_parameters(
        [(name, as_carried(value)) for (name, _), value in zip(named, values, strict=True)], root_rank
    )
    for (_, tensor), value in zip(named, values, strict=True):
        if tensor.data_ptr() != value.data_ptr():
            tensor.detach().copy_(value)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, model: torch.nn.Module | None = None
) -> None:
    """Load the root's optimizer state on every rank, as Horovod does where it can; the memory starts empty.

    Args:
        optimizer: of any class; Horovod refuses LBFGS, and states it cannot send.
        root_rank: whose state.
        model: as Horovod's, which looks in it for sparse embeddings.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if isinstance(optimizer, torch.optim.LBFGS) or any(parameter.dtype not in CARRIED for parameter in parameters):
        state = broadcast_state(default_communicator(), optimizer.state_dict(), root_rank, "hvd_sketch.optimizer")
        optimizer.load_state_dict(state)
    else:
        hvd.broadcast_optimizer_state(optimizer, root_rank, model)
