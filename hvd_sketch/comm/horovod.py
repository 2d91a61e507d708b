"""Collectives through Horovod, by name, on a process set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending


class _Handle(Pending):
    """An operation of Horovod's own thread, which needs no polling."""

    def __init__(self, handle: int, result_of: Callable[[Any], Tensor]) -> None:
        self._handle, self._result_of = handle, result_of

    def wait(self) -> Tensor:
        return self._result_of(hvd.synchronize(self._handle))


class HorovodCommunicator(Communicator):
    """Horovod's own collectives; rank and size follow elastic resets.

    Only named operations are used: Horovod numbers unnamed ones per process, and one extra
    call on one rank would pair all later ones wrongly. Sums and no averages, so that a rank
    that has joined (``hvd.join``) does not change the divisor between two rounds.

    Args:
        process_set: the ranks that take part; all of them when not given.
    """

    def __init__(self, process_set: Any = None) -> None:
        self.process_set = hvd.global_process_set if process_set is None else process_set

    @property
    def rank(self) -> int:
        return int(self.process_set.rank())

    @property
    def size(self) -> int:
        return int(self.process_set.size())

    @property
    def group(self) -> str:
        """The number of the process set."""
        return str(self.process_set.process_set_id)

    @property
    def included(self) -> bool:
        """Whether this process belongs to the process set."""
        return bool(self.process_set.included())

    def reaches(self, device: torch.device) -> bool:
        """Host memory; a GPU's when Horovod was built for GPUs, else it would reduce what has not arrived yet."""
        return device.type == "cpu" or bool(hvd.nccl_built() or hvd.cuda_built())

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        handle = hvd.allreduce_async_(tensor, name=name, op=hvd.Sum, process_set=self.process_set)
        return _Handle(handle, lambda result: tensor)

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        handle = hvd.allgather_async(tensor, name=name, process_set=self.process_set)
        return _Handle(handle, lambda gathered: gathered.view(self.size, -1))

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        handle = hvd.alltoall_async(tensor.contiguous(), name=name, process_set=self.process_set)
        return _Handle(handle, lambda received: received[0])  # the other one tells how much came from whom

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        hvd.broadcast_(tensor, root_rank=root, name=name, process_set=self.process_set)
