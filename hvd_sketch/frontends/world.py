"""Ranks, and what a training script begins with, without Horovod."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator, as_communicator, default_communicator
from hvd_sketch.comm.states import broadcast_pickled, broadcast_state
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.shards import is_sharded


@lru_cache(maxsize=1)
def world() -> Communicator:
    """All ranks."""
    return default_communicator()


def init(comm: Any = None, process_sets: Any = None) -> None:
    """Connect to the other processes, by torch.distributed under torchrun and by mpi4py under mpirun; else none.

    Args:
        comm: an mpi4py communicator that all of this process's ranks are in, to check its size.
        process_sets: None; ``"dynamic"``, with which Horovod may make them later, changes nothing; others need it.

    Raises:
        ConfigurationError: for process sets, or a communicator of other ranks.
    """
    if process_sets and process_sets != "dynamic":
        raise ConfigurationError("hvd.init(process_sets=…) needs Horovod, which is not installed")
    if comm is not None and not isinstance(comm, list) and as_communicator(comm).size != world().size:
        raise ConfigurationError("hvd.init(comm=…) of some ranks only: give that communicator to the optimizer")
    world()


def shutdown() -> None:
    """Forget the communicator; MPI and torch.distributed end with the process."""
    world.cache_clear()


def is_initialized() -> bool:
    """Whether `init` was called."""
    return world.cache_info().currsize > 0


def rank() -> int:
    """This process's number, 0 … size - 1."""
    return world().rank


def size() -> int:
    """Number of processes."""
    return world().size


def local_rank() -> int:
    """This process's number on its host."""
    return world().local[0]


def local_size() -> int:
    """Number of processes on this host."""
    return world().local[1]


def broadcast_object(obj: Any = None, root_rank: int = 0, name: str | None = None, process_set: Any = None) -> Any:
    """The root's object of any kind, on every rank.

    It is pickled, as Horovod does, so whoever calls this trusts the root. Its tensors travel by themselves, so that
    they take the memory that they have, and no more.
    """
    return broadcast_pickled(world(), obj, root_rank, "hvd_sketch.object")


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Every rank's object of any kind, by rank, as `broadcast_object` sends it."""
    return [broadcast_object(obj, root) for root in range(size())]


def broadcast_parameters(params: Mapping[str, Any] | Iterable[Any], root_rank: int = 0) -> None:
    """Overwrite parameters and buffers by the root's: a ``state_dict()``, named parameters, or parameters alone."""
    for name, tensor in tensors_of(params):
        whole = tensor.detach().contiguous()
        world().broadcast(whole, root_rank, name)
        tensor.detach().copy_(whole)


def tensors_of(params: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Tensor]]:
    """What `broadcast_parameters` is given, in an order that is the same on all ranks; what is no tensor is left out.

    Raises:
        ConfigurationError: for a DTensor.
    """
    items = list(params.items() if isinstance(params, Mapping) else params)
    pairs = [item if isinstance(item, tuple) else (f"parameter.{at:06}", item) for at, item in enumerate(items)]
    named = [(name, value) for name, value in sorted(pairs, key=lambda pair: pair[0]) if isinstance(value, Tensor)]
    for name, tensor in named:
        if is_sharded(tensor):
            raise ConfigurationError(
                f"broadcast_parameters: {name!r} is a DTensor, of which each rank has another part; give all "
                "replicas the same seed, or load the same checkpoint, before wrapping"
            )
    return named


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, model: torch.nn.Module | None = None
) -> None:
    """Load the root's optimizer state on every rank; the memory of unsent gradients starts empty.

    With Horovod as well, and not as Horovod does, which has a rank without a state make one by a step, and fails
    where groups have other entries, as of a scheduler that one rank alone has. Takes the memory of one more state, on
    the ranks that get it.
    """
    state = broadcast_state(world(), optimizer.state_dict(), root_rank, "hvd_sketch.optimizer")
    optimizer.load_state_dict(state)
