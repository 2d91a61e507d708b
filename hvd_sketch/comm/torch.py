"""Collectives through a process group of torch.distributed: Gloo on processors, NCCL on GPUs."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.comm.delay import agreed_crossing
from hvd_sketch.comm.ending import ending
from hvd_sketch.comm.patience import VARIABLE, limit_of
from hvd_sketch.errors import ConfigurationError, RankLostError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_THE_HOST = ("gloo", "mpi")  # backends that are given tensors of the host alone
_OUTSIDE = -100  # what torch.distributed calls a group that this process is no member of


def is_initialized() -> bool:
    """Whether this process has a default process group."""
    return dist.is_available() and dist.is_initialized()


def is_launched(*, by_another: bool) -> bool:
    """Whether torchrun has started this process, or somebody who sets the same variables, and no other launcher."""
    if not dist.is_available():
        return False
    like_torchrun = not by_another and all(variable in os.environ for variable in _VARIABLES)
    return like_torchrun or dist.is_torchelastic_launched()


def initialize() -> None:
    """Make the default process group from torchrun's variables: Gloo, and NCCL beside it where there are GPUs."""
    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    limit = timedelta(seconds=limit_of(None)) if VARIABLE in os.environ else None
    dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", timeout=limit)
    if not with_gpus:
        _end_with_the_process(dist.group.WORLD)


def group_of(comm: Any) -> Any:
    """The process group that a user means by a group or by a mesh of one dimension; None for anything else.

    Raises:
        ConfigurationError: for a mesh of several dimensions.
    """
    if not dist.is_available():
        return None
    if isinstance(comm, dist.device_mesh.DeviceMesh):
        if comm.ndim != 1:
            raise ConfigurationError(
                f"comm is a mesh of {comm.ndim} dimensions, {comm.mesh_dim_names}; give the one whose ranks hold "
                'replicas, as in comm=mesh["replicate"]'
            )
        return comm.get_group()
    return comm if isinstance(comm, dist.ProcessGroup) or comm == _OUTSIDE else None


class TorchCommunicator(Communicator):
    """A process group; sums of half precision are the backend's own.

    A group matches operations by their order. Collectives that the caller begins on the same group must come in
    the same order between ours on all ranks; in the group that the default makes they never meet. Gloo and MPI are
    given a GPU's tensors by way of the host. NCCL is given the host's by way of the GPU, and waiting for it holds
    up the device's stream and not the host.

    Args:
        group: the ranks that take part. By default all of them, in a new group (a collective call).
    """

    gathers_by_ring = True

    def __init__(self, group: Any = None) -> None:
        self._group = dist.new_group(timeout=_timeout()) if group is None else group
        self._rank, self._size = dist.get_rank(self._group), dist.get_world_size(self._group)
        config = str(dist.get_backend_config(self._group)) if self.included else ""
        self._backends = dict(entry.split(":") for entry in config.split(",") if entry)
        if group is None:
            self._end_with_the_process()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def world_size(self) -> int:
        """Of the default group."""
        return dist.get_world_size()

    @property
    def host(self) -> str | None:
        """As torchrun numbers them."""
        return os.environ.get("GROUP_RANK") if "LOCAL_WORLD_SIZE" in os.environ else None

    @property
    def sends_by_tcp(self) -> bool:
        """Gloo does, and it sends what is in host memory."""
        return self._backends.get("cpu") == "gloo"

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """A group that its members alone make, of the same backend."""
        group = dist.new_group(
            [dist.get_global_rank(self._group, rank) for rank in ranks],
            timeout=_timeout(),
            backend=str(dist.get_backend_config(self._group)),
            use_local_synchronization=True,
        )
        made = TorchCommunicator(group)
        made._end_with_the_process()
        return made

    @property
    def included(self) -> bool:
        """Whether this process belongs to the group."""
        return self._rank >= 0

    @cached_property
    def crossing(self) -> float:
        """As it is measured."""
        return agreed_crossing(lambda message, name: self.post_alltoall(message, name).wait(), self.size)

    def reaches(self, device: torch.device) -> bool:
        """Host memory; a GPU's where the group has a backend for it."""
        return device.type == "cpu" or self._backends.get(device.type, "gloo") not in _OF_THE_HOST

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        total = self._within_reach(tensor)
        what = self.in_words(f"allreduce {name}")
        with self.explaining(what):
            work = dist.all_reduce(total, group=self._group, async_op=True)
        return _Handle(self, what, work, (total, total), tensor)

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        sent = self._within_reach(tensor)
        result = torch.empty(self.size, sent.numel(), dtype=sent.dtype, device=sent.device)
        what = self.in_words(f"allgather {name}")
        with self.explaining(what):
            work = _gather(result.view(-1), sent, group=self._group, async_op=True)
        return _Handle(self, what, work, (sent, result), self._for(tensor, result))

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        sent = self._within_reach(tensor.contiguous())
        result = torch.empty_like(sent)
        what = self.in_words(f"alltoall {name}")
        with self.explaining(what):
            work = dist.all_to_all_single(result, sent, group=self._group, async_op=True)
        return _Handle(self, what, work, (sent, result), self._for(tensor, result))

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        value = self._within_reach(tensor)
        with self.explaining(self.in_words(f"broadcast {name} from rank {root}")):
            dist.broadcast(value, dist.get_global_rank(self._group, root), group=self._group)
        if value is not tensor:
            tensor.copy_(value)

    @contextmanager
    def explaining(self, what: str) -> Iterator[None]:
        """Inside, in this operation, a failure of the backend says what it most likely means.

        Raises:
            RankLostError: in place of the backend's own, which is its cause.
        """
        try:
            yield
        except RuntimeError as error:
            raise RankLostError(
                f"rank {self._rank} of {self._size} lost the others in {what}: one of them ended, or did not come "
                f"in time; look for the first error of all ranks. torch.distributed says: {error}"
            ) from error

    def leave(self) -> None:
        """Let go of the group; no operation can follow."""
        self._group = None

    def _end_with_the_process(self) -> None:
        if set(self._backends.values()) == {"gloo"}:
            _end_with_the_process(self._group, self)

    def _within_reach(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy where the group has a backend for."""
        if tensor.device.type in self._backends:
            return tensor
        return tensor.to(next(iter(self._backends)))

    def _for(self, tensor: Tensor, result: Tensor) -> Tensor:
        """Where a result belongs: beside the tensor that was given."""
        return result if result.device == tensor.device else torch.empty_like(result, device=tensor.device)


class _Handle(Pending):
    """An operation of the backend's own threads, which needs no polling. Keeps what is sent alive."""

    def __init__(
        self, comm: TorchCommunicator, what: str, work: Any, moving: tuple[Tensor, Tensor], into: Tensor
    ) -> None:
        super().__init__(into)
        self._comm, self._what, self._work, self._moving = comm, what, work, moving

    def wait(self) -> Tensor:
        with self._comm.explaining(self._what):
            self._work.wait()
        arrived = self._moving[1]
        return self._result if arrived is self._result else self._result.copy_(arrived)


def _gather(result: Tensor, sent: Tensor, **keywords: Any) -> Any:
    """An allgather by the name that this PyTorch has for it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter before 2.13
    return gather(result, sent, **keywords)


def _timeout() -> timedelta | None:
    """The environment's, or that of the default group, which a new one would not have; None if it cannot be told."""
    if VARIABLE in os.environ:
        return timedelta(seconds=limit_of(None))
    for device in dist.group.WORLD._device_types:  # type: ignore[union-attr]
        options = getattr(dist.group.WORLD._get_backend(device), "options", None)  # type: ignore[union-attr]
        if options is not None:
            timeout: timedelta = options._timeout
            return timeout
    return None


_made: list[tuple[Any, weakref.ref[TorchCommunicator] | None]] = []
"""Groups of Gloo that the script has not made, and by whom they are used."""


def _end_with_the_process(group: Any, user: TorchCommunicator | None = None) -> None:
    _made.append((group, None if user is None else weakref.ref(user)))
    ending.watch()


@atexit.register
def _leave() -> None:
    """Join Gloo's threads: one that lets go of a tensor when Python has ended aborts the process.

    Not after a failure, when it may wait for others that never come.
    """
    while _made and ending.failure is None:
        group, user = _made.pop()
        communicator = None if user is None else user()
        if communicator is not None:
            communicator.leave()
        with suppress(ValueError):  # the script has ended it
            dist.destroy_process_group(group)
        del group  # the last of it, which joins its threads
