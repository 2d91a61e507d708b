"""Collectives through mpi4py, without Horovod."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from mpi4py import MPI
from mpi4py.typing import Buffer
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.comm.delay import agreed_crossing
from hvd_sketch.comm.patience import limit_of, wait_until
from hvd_sketch.comm.roll_call import RollCall
from hvd_sketch.errors import ConfigurationError, RankLostError


def _add_halves(incoming: Buffer, accumulated: Buffer, _datatype: MPI.Datatype) -> None:
    total = torch.frombuffer(accumulated, dtype=torch.float16)
    total.add_(torch.frombuffer(incoming, dtype=torch.float16))


_HALF_SUM = MPI.Op.Create(_add_halves, commute=True)  # MPI itself has no half precision
_HALF = MPI.BYTE.Create_contiguous(2).Commit()


_forsaken: dict[int, tuple[MPI.Request, Tensor, Tensor]] = {}
"""Collectives that nobody waits for any more, as when an optimizer is dropped; MPI still reads and writes there."""

_letting_go = threading.Lock()


def _let_go_of_forsaken() -> None:
    """Of those that are through; not in two threads at a time, for a request is tested by one."""
    if _letting_go.acquire(blocking=False):
        try:
            for number, forsaken in list(_forsaken.items()):
                if forsaken[0].Test():
                    del _forsaken[number]
        finally:
            _letting_go.release()


class _Request(Pending):
    """MPI may move a message only while it is called, hence the polling. Keeps what is sent alive until it has."""

    def __init__(self, request: MPI.Request, sent: Tensor, result: Tensor, roll_call: RollCall, what: str) -> None:
        super().__init__(result)
        self._request, self._sent = request, sent
        self._roll_call, self._number, self._what = roll_call, roll_call.begin(request), what
        _let_go_of_forsaken()

    def __del__(self) -> None:
        if self._request:  # a null request, which is what one becomes in the end, is false
            _forsaken[id(self._request)] = self._request, self._sent, self._result

    def poll(self) -> None:
        self._request.Test()

    def wait(self) -> Tensor:
        self._roll_call.wait(self._request, self._number, self._what)
        return self._result


def _buffer(host: Tensor) -> Any:
    if host.dtype == torch.float16:
        return [_bytes(host), host.numel(), _HALF]
    return host.numpy()


def _bytes(host: Tensor) -> Any:
    return host.reshape(-1).view(torch.uint8).numpy()


class MpiCommunicator(Communicator):
    """An MPI communicator; tensors on a GPU travel through host memory.

    When this process ends by an exception, MPI ends all ranks, as under ``python -m mpi4py``.

    Args:
        comm: an intracommunicator, by default ``MPI.COMM_WORLD``. It is duplicated (a
            collective call), so that messages of the caller's own never meet ours.
        timeout: seconds that a rank waits for the others in one collective; by default
            the environment's ``HVD_SKETCH_TIMEOUT``, or half an hour.

    Raises:
        RankLostError: when others do not come.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, timeout: float | None = None) -> None:
        self._limit = limit_of(timeout)
        self._comm = _duplicate(MPI.COMM_WORLD if comm is None else comm, self._limit)
        self._roll_call = RollCall(self._comm, self._limit)
        # kept, because Horovod may end MPI under us: it does so on all ranks as soon as one of them is through
        self._rank, self._size = self._comm.Get_rank(), self._comm.Get_size()
        on_host = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._local = on_host.Get_rank(), on_host.Get_size()
        self._first_on_host = on_host.bcast(self._rank)
        on_host.Free()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def local(self) -> tuple[int, int]:
        """As MPI knows who shares memory."""
        return self._local

    @cached_property
    def crossing(self) -> float:
        """As it is measured."""
        return agreed_crossing(lambda message, name: self.post_alltoall(message, name).wait(), self.size)

    @property
    def host(self) -> str:
        """The first of the ranks there."""
        return str(self._first_on_host)

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """By MPI's split."""
        part = MPI.Intracomm(self._comm.Split(min(ranks), self._rank))
        try:
            return MpiCommunicator(part, self._limit)
        finally:
            part.Free()

    def apart(self) -> Communicator:
        """A duplicate, where MPI serves several threads.

        Raises:
            ConfigurationError: where it was initialised for one.
        """
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ConfigurationError(
                "MPI was initialised without MPI_THREAD_MULTIPLE, so no thread can exchange while another one calls "
                "MPI; import mpi4py before anything else initialises MPI, and leave mpi4py.rc.thread_level at "
                "'multiple', or give delayed=False"
            )
        return MpiCommunicator(self._comm, self._limit)

    def reaches(self, device: torch.device) -> bool:
        """Host memory alone."""
        return device.type == "cpu"

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        # never in place: then Open MPI sends whole vectors along a tree, where it would otherwise use a ring
        sent, op = tensor.clone(), _HALF_SUM if tensor.dtype == torch.float16 else MPI.SUM
        request = self._comm.Iallreduce(_buffer(sent), _buffer(tensor), op=op)
        return self.under_way(request, sent, tensor, f"allreduce {name}")

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        result = torch.empty(
            self.size, tensor.numel(), dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_pinned()
        )
        request = self._comm.Iallgather(_bytes(tensor), _bytes(result))
        return self.under_way(request, tensor, result, f"allgather {name}")

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        sent = tensor.contiguous()
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_pinned())
        return self.under_way(self._comm.Ialltoall(_bytes(sent), _bytes(result)), sent, result, f"alltoall {name}")

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        request = self._comm.Ibcast(_bytes(tensor), root=root)
        self.under_way(request, tensor, tensor, f"broadcast {name} from rank {root}").wait()

    def under_way(self, request: MPI.Request, sent: Tensor, result: Tensor, what: str) -> Pending:
        """A collective of all ranks that has begun; it keeps alive what is sent."""
        return _Request(request, sent, result, self._roll_call, self.in_words(what))


def _duplicate(comm: MPI.Intracomm, limit: float) -> MPI.Intracomm:
    """A communicator of the same ranks."""
    duplicate, request = comm.Idup()
    if not wait_until(request.Test, lambda share: None, limit):
        raise RankLostError(
            f"rank {comm.Get_rank()}: waited {limit:g} s for the other ranks to make the same communicator; all ranks "
            "must wrap as many optimizers, in the same order"
        )
    return duplicate
