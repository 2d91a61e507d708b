"""Many ranks in one process, a thread each: for simulations and tests of arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending

Result = TypeVar("Result")


class _Meeting:
    """Where the threads exchange their contributions; failures break it for all."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class InProcess(Communicator):
    """One of several ranks that share a process; made by `InProcessGroup`."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self._rank, self._size, self._meeting = rank, size, meeting

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def starts_in_backward(self, device: torch.device) -> bool:
        """Not on a GPU: a process's backward passes share one thread there, and each would wait for the others."""
        return device.type == "cpu"

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        contributions = self._meeting.gather(self._rank, tensor.clone())
        tensor.copy_(contributions[0])
        for contribution in contributions[1:]:
            tensor.add_(contribution)
        return Pending(tensor)

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        return Pending(torch.stack(self._meeting.gather(self._rank, tensor.clone())))

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        rows = [sent[self._rank] for sent in self._meeting.gather(self._rank, tensor.clone())]
        return Pending(torch.stack(rows))

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        tensor.copy_(self._meeting.gather(self._rank, tensor.clone())[root])


class InProcessGroup:
    """The ranks of one process; their communicators last from one `run` to the next."""

    def __init__(self, size: int) -> None:
        meeting = _Meeting(size)
        self._meeting = meeting
        self.communicators = [InProcess(rank, size, meeting) for rank in range(size)]

    def run(self, body: Callable[[Communicator], Result]) -> list[Result]:
        """Call ``body(communicator)`` on a thread for each rank and return the results by rank.

        The first exception of any rank is raised here; the others are woken up and dropped.
        """
        results: list[Any] = [None] * len(self.communicators)
        errors: list[BaseException] = []

        def call(communicator: InProcess) -> None:
            try:
                results[communicator.rank] = body(communicator)
            except threading.BrokenBarrierError:
                return
            except BaseException as error:
                errors.append(error)
                self._meeting.barrier.abort()

        threads = [threading.Thread(target=call, args=(communicator,)) for communicator in self.communicators]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def run_in_process(size: int, body: Callable[[Communicator], Result]) -> list[Result]:
    """Call ``body(communicator)`` on ``size`` threads that stand for ranks; the results by rank."""
    return InProcessGroup(size).run(body)
