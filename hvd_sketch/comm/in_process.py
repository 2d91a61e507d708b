"""Many ranks in one process, a thread each: for simulations and tests of arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.comm.patience import limit_of, ranks
from hvd_sketch.errors import RankLostError

Result = TypeVar("Result")


class _Meeting:
    """Where the threads exchange their contributions."""

    def __init__(self, size: int, limit: float) -> None:
        self._size, self._limit = size, limit
        self._changed = threading.Condition()
        self._parts: list[tuple[Sequence[int], _Meeting]] = []
        self.begin()

    def begin(self) -> None:
        """All ranks are there, and nothing is under way."""
        self._waiting: dict[int, Any] = {}
        self._ended: dict[int, str] = {}
        self._met, self._values = 0, None
        for _, part in self._parts:
            part.begin()

    def gather(self, rank: int, value: Any, what: str, combine: Callable[[list[Any]], Any] = list) -> Any:
        """Of what every rank gives, by rank, what the last one to come makes of it; the same object for all.

        Raises:
            RankLostError: when a rank has ended, or after the limit.
        """
        with self._changed:
            self._waiting[rank], number = value, self._met
            if len(self._waiting) == self._size:
                self._values = combine([self._waiting[other] for other in range(self._size)])
                self._waiting, self._met = {}, number + 1
                self._changed.notify_all()
            elif not self._changed.wait_for(lambda: self._met > number or self._ended, self._limit):
                silent = set(range(self._size)) - set(self._waiting)
                raise RankLostError(f"rank {rank}: waited {self._limit:g} s in {what} for {ranks(silent)}")
            if self._met == number:
                lost, why = next(iter(self._ended.items()))
                raise RankLostError(f"rank {rank}: waits in {what} for rank {lost}, which ended {why}")
            return self._values

    def leave(self, rank: int, why: str) -> None:
        """A rank takes part no longer."""
        with self._changed:
            self._ended[rank] = why
            self._changed.notify_all()
        for members, part in list(self._parts):
            if rank in members:
                part.leave(members.index(rank), why)

    def part_of(self, members: Sequence[int]) -> _Meeting:
        """Where some of the threads meet; they leave it when they leave this one."""
        part = _Meeting(len(members), self._limit)
        self._parts.append((members, part))
        return part


class InProcess(Communicator):
    """One of several ranks that share a process; made by `InProcessGroup`."""

    def __init__(self, rank: int, size: int, meeting: _Meeting, host: int | None = None) -> None:
        self._rank, self._size, self._meeting, self._host = rank, size, meeting, host

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def host(self) -> str | None:
        """The number of the one that it was said to be on."""
        return None if self._host is None else str(self._host)

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """Its first rank makes the place to meet."""
        part = self._meeting.part_of(ranks) if self._rank == ranks[0] else None
        parts = self._meeting.gather(self._rank, part, "subgroup")
        return InProcess(ranks.index(self._rank), len(ranks), parts[ranks[0]])

    def starts_in_backward(self, device: torch.device) -> bool:
        """Not on a GPU: a process's backward passes share one thread there, and each would wait for the others."""
        return device.type == "cpu"

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor.copy_(self._gather(tensor.clone(), f"allreduce {name}", _sum)))

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        return Pending(self._gather(tensor.clone(), f"allgather {name}", torch.stack).clone())

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        return Pending(self._gather(tensor.clone(), f"alltoall {name}", torch.stack)[:, self._rank].clone())

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        sent = tensor.clone() if self._rank == root else None
        tensor.copy_(self._gather(sent, f"broadcast {name} from rank {root}", lambda values: values[root]))

    def _gather(self, value: Tensor | None, what: str, combine: Callable[[list[Any]], Tensor]) -> Tensor:
        result: Tensor = self._meeting.gather(self._rank, value, self.in_words(what), combine)
        return result


def _sum(contributions: list[Tensor]) -> Tensor:
    total, *others = contributions
    for contribution in others:
        total.add_(contribution)
    return total


class InProcessGroup:
    """The ranks of one process; their communicators last from one `run` to the next.

    Args:
        size: how many.
        timeout: seconds that a rank waits for the others in one collective; by default
            the environment's ``HVD_SKETCH_TIMEOUT``, or half an hour.
        hosts: the number of the host that each rank stands for being on.
    """

    def __init__(self, size: int, timeout: float | None = None, hosts: Sequence[int] | None = None) -> None:
        self._meeting = meeting = _Meeting(size, limit_of(timeout))
        self.communicators = [
            InProcess(rank, size, meeting, None if hosts is None else hosts[rank]) for rank in range(size)
        ]

    def run(self, body: Callable[[Communicator], Result]) -> list[Result]:
        """Call ``body(communicator)`` on a thread for each rank and return the results by rank.

        The first exception of any rank is raised here; those that wait for it are woken up by a `RankLostError`.
        """
        results: list[Any] = [None] * len(self.communicators)
        errors: list[BaseException] = []
        self._meeting.begin()

        def call(communicator: InProcess) -> None:
            why = "without an error: all must take the same number of steps"
            try:
                results[communicator.rank] = body(communicator)
            except BaseException as error:
                errors.append(error)
                why = f"by {type(error).__name__}: {error}"
            finally:
                self._meeting.leave(communicator.rank, why)

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
