"""Collectives through mpi4py, without Horovod."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI
from mpi4py.typing import Buffer
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending


def _add_halves(incoming: Buffer, accumulated: Buffer, _datatype: MPI.Datatype) -> None:
    total = torch.frombuffer(accumulated, dtype=torch.float16)
    total.add_(torch.frombuffer(incoming, dtype=torch.float16))


_HALF_SUM = MPI.Op.Create(_add_halves, commute=True)  # MPI itself has no half precision
_HALF = MPI.BYTE.Create_contiguous(2).Commit()


class _Request(Pending):
    """MPI may move a message only while it is called, hence the polling. Keeps what is sent alive."""

    def __init__(self, request: MPI.Request, sent: Tensor, result: Tensor) -> None:
        super().__init__(result)
        self._request, self._sent = request, sent

    def poll(self) -> None:
        self._request.Test()

    def wait(self) -> Tensor:
        self._request.Wait()
        return self._result


def _buffer(host: Tensor) -> Any:
    if host.dtype == torch.float16:
        return [_bytes(host), host.numel(), _HALF]
    return host.numpy()


def _bytes(host: Tensor) -> Any:
    return host.reshape(-1).view(torch.uint8).numpy()


class MpiCommunicator(Communicator):
    """An MPI communicator; tensors on a GPU travel through host memory.

    Args:
        comm: an intracommunicator, by default ``MPI.COMM_WORLD``. It is duplicated (a
            collective call), so that messages of the caller's own never meet ours.
    """

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        # kept, because Horovod may end MPI under us: it does so on all ranks as soon as one of them is through
        self._rank, self._size = self._comm.Get_rank(), self._comm.Get_size()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def reaches(self, device: torch.device) -> bool:
        """Host memory alone."""
        return device.type == "cpu"

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        # never in place: then Open MPI sends whole vectors along a tree, where it would otherwise use a ring
        sent, op = tensor.clone(), _HALF_SUM if tensor.dtype == torch.float16 else MPI.SUM
        return _Request(self._comm.Iallreduce(_buffer(sent), _buffer(tensor), op=op), sent, tensor)

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        result = torch.empty(
            self.size, tensor.numel(), dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_pinned()
        )
        return _Request(self._comm.Iallgather(_bytes(tensor), _bytes(result)), tensor, result)

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        sent = tensor.contiguous()
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_pinned())
        return _Request(self._comm.Ialltoall(_bytes(sent), _bytes(result)), sent, result)

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        self._comm.Bcast(_bytes(tensor), root=root)
