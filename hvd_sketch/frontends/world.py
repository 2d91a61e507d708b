"""The part of ``horovod.torch`` that training scripts use, without Horovod."""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator, default_communicator


@lru_cache(maxsize=1)
def _world() -> Communicator:
    return default_communicator()


def init() -> None:
    """Connect to the other processes: mpi4py under a launcher, else this process alone."""
    _world()


def shutdown() -> None:
    """Forget the communicator; MPI itself ends with the process."""
    _world.cache_clear()


def is_initialized() -> bool:
    """Whether `init` was called."""
    return _world.cache_info().currsize > 0


def rank() -> int:
    """This process's number, 0 … size - 1."""
    return _world().rank


def size() -> int:
    """Number of processes."""
    return _world().size


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", os.environ.get("MPI_LOCALRANKID", "0")))


def local_size() -> int:
    """Number of processes on this host."""
    return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", os.environ.get("MPI_LOCALNRANKS", "1")))


def allreduce(tensor: Tensor, name: str = "allreduce", op: int = 0) -> Tensor:
    """The mean (``op=Average``) or sum (``op=Sum``) of a tensor over the ranks; the input stays."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    _world().allreduce(result, name)
    return result / size() if op == 0 else result


def broadcast_object(value: Any, root_rank: int = 0, name: str = "object") -> Any:
    """The root's picklable value, on every rank."""
    text = base64.b64encode(pickle.dumps(value)).decode() if rank() == root_rank else None
    return pickle.loads(base64.b64decode(_world().allgather_object(text, name)[root_rank]))


def broadcast_parameters(params: Mapping[str, Any] | Iterable[tuple[str, Tensor]], root_rank: int = 0) -> None:
    """Overwrite parameters and buffers (a ``state_dict()`` or named parameters) by the root's."""
    items = params.items() if isinstance(params, Mapping) else params
    for name, tensor in sorted(items, key=lambda item: item[0]):
        if isinstance(tensor, Tensor):
            whole = tensor.detach().contiguous()
            _world().broadcast(whole, root_rank, name)
            tensor.detach().copy_(whole)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0) -> None:
    """Load the root's optimizer state on every rank; the memory of unsent gradients starts empty."""
    optimizer.load_state_dict(broadcast_object(optimizer.state_dict(), root_rank, "optimizer"))
