"""Parameters of which every rank holds a shard: DTensors, as ``fully_shard`` makes them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.torch import TorchCommunicator, group_of
from hvd_sketch.errors import ConfigurationError

_REMEDY = (
    'shard inside a host and exchange between hosts: fully_shard(model, mesh=mesh["shard"]), and '
    'DistributedOptimizer(…, comm=mesh["replicate"]) of the same mesh'
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part only."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory: of a DTensor its shard, of another all of it."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return shard


def local_parts(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """What this process has of each of them, under its name."""
    return [(name, local(parameter)) for name, parameter in named]


def gather_anew(module: torch.nn.Module) -> None:
    """Let FSDP gather again what it still holds whole of a module, whose shards have changed."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for part in module.modules() if fsdp is not None else ():
        if isinstance(part, fsdp.FSDPModule):  # type: ignore[union-attr]
            part.reshard()


class Shards:
    """The ranks between which parameters are sharded.

    Each of them exchanges its own shards with those that hold the same ones. Whether a step is void and how a
    gradient is clipped is a matter of the whole gradient, of which this adds up the norm.

    Sent: 8 bytes a step, summed over these ranks.
    """

    def __init__(self, group: Any) -> None:
        self._comm = TorchCommunicator(group)

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Shards | None:
        """Those of parameters that `check_shards` has passed; None if they are whole."""
        sharded = [parameter for parameter in parameters if is_sharded(parameter)]
        return cls(sharded[0].device_mesh.get_group()) if sharded else None  # type: ignore[attr-defined]

    def norm(self, norm: float) -> float:
        """The norm of the whole gradient, on all ranks the same, from that of each rank's shards."""
        square = torch.tensor([norm * norm], dtype=torch.float64, device="cpu")
        self._comm.allreduce(square, "hvd_sketch.norm")
        return math.sqrt(float(square))


def check_shards(named: Sequence[tuple[str, Tensor]], comm: Any, unfit: Mapping[str, bool]) -> None:
    """Refuse sharded parameters that cannot be exchanged with these ranks, alike on all of them.

    Args:
        named: the parameters.
        comm: what the user gave.
        unfit: settings that do not go with shards, and whether they were chosen.

    Raises:
        ConfigurationError: with the name of a parameter and what to do.
    """
    sharded = {name: parameter for name, parameter in sorted(named, key=lambda item: item[0]) if is_sharded(parameter)}
    if not sharded:
        return
    name, first = next(iter(sharded.items()))
    of_name = f"parameter {name!r} is a DTensor"
    for setting in (setting for setting, chosen in unfit.items() if chosen):
        raise ConfigurationError(f"{of_name}, with which {setting} does not work; leave that away")
    if len(sharded) < len(named):
        whole = next(name for name, _ in named if name not in sharded)
        raise ConfigurationError(f"{of_name}, and {whole!r} is none; give each kind an optimizer of its own")
    meshes = {parameter.device_mesh for parameter in sharded.values()}  # type: ignore[attr-defined]
    placements = {placement for each in sharded.values() for placement in each.placements}  # type: ignore[attr-defined]
    mesh = first.device_mesh  # type: ignore[attr-defined]
    if len(meshes) > 1 or mesh.ndim != 1 or not all(placement.is_shard() for placement in placements):
        raise ConfigurationError(f"{of_name} on {mesh} by {first.placements}; {_REMEDY}")  # type: ignore[attr-defined]
    _check_ranks(of_name, set(mesh.mesh.flatten().tolist()), _global_ranks(comm))


def _check_ranks(of_name: str, holders: set[int], ranks: set[int]) -> None:
    """Of the ranks that hold the shards between them, this one alone is among those to exchange with."""
    if not ranks:
        raise ConfigurationError(f"{of_name}, of which this process has a part only; {_REMEDY}")
    if ranks == holders:
        raise ConfigurationError(
            f"{of_name}, whose gradients FSDP sums over the ranks of comm itself, and leaves nothing to compress; "
            f"{_REMEDY}"
        )
    if ranks & holders != {dist.get_rank()}:
        raise ConfigurationError(
            f"{of_name} sharded between ranks {sorted(holders)}, of which comm, over ranks {sorted(ranks)}, has "
            f"several, and they hold other shards; {_REMEDY}"
        )


def _global_ranks(comm: Any) -> set[int]:
    """Of a process group or a mesh; none of anything else."""
    if comm is None or isinstance(comm, Communicator) or not dist.is_initialized():
        return set()
    group = group_of(comm)
    return set() if group is None else set(dist.get_process_group_ranks(group))
