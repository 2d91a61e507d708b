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


class _Sum(Pending):
    """An allreduce under way. MPI may move a message only while it is called, hence the polling.

    Never in place: then Open MPI sends whole vectors along a tree, where it would otherwise use a ring.
    """

    def __init__(self, comm: MPI.Intracomm, tensor: Tensor) -> None:
        self._tensor, on_host = tensor, tensor.device.type == "cpu"
        self._sent = tensor.clone() if on_host else tensor.cpu()
        self._sum = tensor if on_host else torch.empty_like(self._sent)
        op = _HALF_SUM if tensor.dtype == torch.float16 else MPI.SUM
        self._request = comm.Iallreduce(_buffer(self._sent), _buffer(self._sum), op=op)

    def poll(self) -> None:
        self._request.Test()

    def wait(self) -> None:
        self._request.Wait()
        if self._sum is not self._tensor:
            self._tensor.copy_(self._sum)


def _buffer(host: Tensor) -> Any:
    if host.dtype == torch.float16:
        return [host.view(torch.uint8).numpy(), host.numel(), _HALF]
    return host.numpy()


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

    def _allreduce(self, tensor: Tensor, name: str) -> None:
        _Sum(self._comm, tensor).wait()

    def _start_allreduce(self, tensor: Tensor, name: str) -> Pending:
        return _Sum(self._comm, tensor)

    def _allgather(self, tensor: Tensor, name: str) -> Tensor:
        gathered = torch.empty(self.size, tensor.numel(), dtype=tensor.dtype)
        self._comm.Allgather(tensor.cpu().view(torch.uint8).numpy(), gathered.view(torch.uint8).numpy())
        return gathered.to(tensor.device)

    def _alltoall(self, tensor: Tensor, name: str) -> Tensor:
        received = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._comm.Alltoall(tensor.cpu().contiguous().view(torch.uint8).numpy(), received.view(torch.uint8).numpy())
        return received.to(tensor.device)

    def _broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        host = tensor.cpu()
        self._comm.Bcast(host.reshape(-1).view(torch.uint8).numpy(), root=root)
        if host is not tensor:
            tensor.copy_(host)
