"""Everything that stands in for ``horovod.torch`` where Horovod is not installed."""

from __future__ import annotations

from typing import Any

from hvd_sketch.comm import is_installed
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.frontends.collectives import (
    allgather,
    allreduce,
    allreduce_,
    alltoall,
    barrier,
    broadcast,
    broadcast_,
    grouped_allgather,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_reducescatter,
    reducescatter,
)
from hvd_sketch.frontends.handles import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    Sum,
    allgather_async,
    allreduce_async,
    allreduce_async_,
    alltoall_async,
    broadcast_async,
    broadcast_async_,
    global_process_set,
    grouped_allgather_async,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter_async,
    poll,
    reducescatter_async,
    sparse_allreduce_async,
    synchronize,
)
from hvd_sketch.frontends.world import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)

__all__ = [
    "Adasum",
    "Average",
    "HorovodInternalError",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_timeline",
    "synchronize",
]


class HorovodInternalError(RuntimeError):
    """What Horovod raises when a collective fails; never raised here."""


class _NeedsHorovod:
    """A name that there is with Horovod only; whoever uses it is told."""

    def __init__(self, name: str, instead: str) -> None:
        self._told = f"hvd.{name} needs Horovod, which is not installed: {instead}"

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        raise ConfigurationError(self._told)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigurationError(self._told)


elastic = _NeedsHorovod("elastic", "save checkpoints, and start again with another number of ranks")
ProcessSet = _NeedsHorovod("ProcessSet", "give an optimizer an MPI communicator, comm=")
add_process_set = _NeedsHorovod("add_process_set", "give an optimizer an MPI communicator, comm=")
remove_process_set = _NeedsHorovod("remove_process_set", "give an optimizer an MPI communicator, comm=")
SyncBatchNorm = _NeedsHorovod("SyncBatchNorm", "use GroupNorm, or BatchNorm with statistics of each rank's own")
start_timeline = _NeedsHorovod("start_timeline", "use torch.profiler")
stop_timeline = _NeedsHorovod("stop_timeline", "use torch.profiler")


def cross_size() -> int:
    """Number of hosts, if all have equally many processes."""
    return size() // local_size()


def cross_rank() -> int:
    """This host's number, if processes are numbered host by host."""
    return rank() // local_size()


def mpi_built() -> bool:
    """Whether mpi4py is there."""
    return is_installed("mpi4py")


def mpi_enabled() -> bool:
    """Whether ranks are connected by it."""
    return size() > 1


def mpi_threads_supported() -> bool:
    """Whether several threads may call MPI at a time."""
    if not mpi_enabled():
        return False
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


def gloo_built() -> bool:
    """Never: that is Horovod's."""
    return False


def gloo_enabled() -> bool:
    """Never."""
    return False


def nccl_built() -> int:
    """Never, 0: GPUs' tensors travel through host memory."""
    return 0


def ddl_built() -> bool:
    """Never."""
    return False


def ccl_built() -> bool:
    """Never."""
    return False


def cuda_built() -> bool:
    """Never."""
    return False


def rocm_built() -> bool:
    """Never."""
    return False
