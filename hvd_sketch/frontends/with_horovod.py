"""What Horovod has as well, for whatever PyTorch trains: of every type, in every order of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import horovod.torch as hvd

from hvd_sketch.comm.horovod import as_carried
from hvd_sketch.frontends.world import tensors_of


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
