"""Who takes part in an MPI communicator's collectives, who waits, and who has ended."""

from __future__ import annotations

import atexit
import json
import sys
import time
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

from mpi4py import MPI
from mpi4py.run import set_abort_status

from hvd_sketch.comm.ending import ending
from hvd_sketch.comm.patience import ranks, wait_until
from hvd_sketch.errors import RankLostError

_TAG = 7
_GRACE = 5.0  # seconds for others to hear of a failure before MPI ends them
_LONG = 0.5  # of the limit: then a rank says where it waits


class Kind(StrEnum):
    """What is told of a rank."""

    WAITS = "waits"  # in its collective of this number
    ENDED = "ended"  # and so many collectives were all


class Fact(NamedTuple):
    """What one rank tells of itself, and others pass on."""

    kind: Kind
    rank: int
    number: int
    text: str


class RollCall:
    """Waits for collectives, which MPI itself would do for ever.

    A rank that ends says so, with the number of the last collective that it took part in: whoever waits for a later
    one knows at once that it will never come. A rank that waits long says so as well, and whoever hears it and waits
    too answers; so those that are missing when the limit is reached are the silent ones. Facts travel to the ranks
    1, 2, 4, 8 … up and down, which pass them on, along the communicator of the collectives, of which messages between
    two ranks are apart.

    Args:
        comm: of nobody else.
        limit: seconds that a rank waits for one collective.
    """

    def __init__(self, comm: MPI.Intracomm, limit: float) -> None:
        self._comm, self._limit = comm, limit
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        steps = [1 << bit for bit in range((self._size - 1).bit_length())]
        self._near = {(self._rank + step * way) % self._size for step in steps for way in (1, -1)} - {self._rank}
        self._begun = 0
        self._waiting: dict[int, Fact] = {}
        self._ended: dict[int, Fact] = {}
        self._leaving: list[MPI.Request] = []
        self._open: list[tuple[MPI.Request, int]] = []
        if self._size > 1:
            _roll_calls.append(self)
            ending.tell(_set_status)

    def begin(self, request: MPI.Request) -> int:
        """The number of the collective that this rank has just begun."""
        self._begun += 1
        self._open = [open_ for open_ in self._open if open_[0]]  # one that is through is false
        self._open.append((request, self._begun))
        return self._begun

    def wait(self, request: MPI.Request, number: int, what: str) -> None:
        """Wait for a collective.

        Raises:
            RankLostError: when a rank has ended that did not take part in it, or after the limit.
        """

        def look(share: float) -> None:
            if MPI.Is_finalized():
                raise RankLostError(f"rank {self._rank}: MPI was ended while this rank waited in {what}")
            self._hear()
            self._check(number, what)
            if share >= _LONG or self._others_wait(number):
                self._say(Kind.WAITS, number, what)

        if not wait_until(request.Test, look, self._limit):
            raise RankLostError(self._too_late(number, what))

    def leave(self) -> None:
        """Say that this rank ends; after a failure wait until the others know, for MPI will end them with this one."""
        if MPI.Is_finalized():
            return
        self._say(Kind.ENDED, self._begun, ending.failure or "")
        deadline = time.monotonic() + _GRACE
        while ending.failure and ending.aborts and len(self._ended) < self._size and time.monotonic() < deadline:
            self._hear()
            time.sleep(1e-3)

    def finish(self) -> None:
        """Let come to its end what is under way and nobody waits for: MPI crashes or hangs if it ends before."""
        for request, number in self._open:
            if request and not MPI.Is_finalized():
                with suppress(RankLostError):
                    self.wait(request, number, "the last collective before its end")

    def _say(self, kind: Kind, number: int, text: str) -> None:
        self._note(Fact(kind, self._rank, number, text))

    def _note(self, fact: Fact) -> None:
        """Remember a fact and pass it on, unless it is known."""
        known = self._waiting if fact.kind == Kind.WAITS else self._ended
        if fact.rank in known and known[fact.rank].number >= fact.number:
            return
        known[fact.rank] = fact
        message = json.dumps(fact).encode()
        self._leaving = [request for request in self._leaving if not request.Test()]
        self._leaving += [self._comm.Isend(bytearray(message), dest=other, tag=_TAG) for other in self._near]

    def _hear(self) -> None:
        """Take in what came."""
        status = MPI.Status()
        while (arriving := self._comm.Improbe(tag=_TAG, status=status)) is not None:
            message = bytearray(status.Get_count(MPI.BYTE))
            arriving.Recv(message)
            kind, rank, number, text = json.loads(message)
            self._note(Fact(Kind(kind), int(rank), int(number), str(text)))

    def _others_wait(self, number: int) -> bool:
        return any(fact.number == number for rank, fact in self._waiting.items() if rank != self._rank)

    def _check(self, number: int, what: str) -> None:
        """Raise if somebody has ended that the collective needs."""
        lost = [fact for rank, fact in sorted(self._ended.items()) if rank != self._rank and fact.number < number]
        if lost:
            why = f"by {lost[0].text}" if lost[0].text else "without an error: all must take the same number of steps"
            raise RankLostError(
                f"rank {self._rank}: waits in {what} for {ranks([fact.rank for fact in lost])}, which ended {why}"
            )

    def _too_late(self, number: int, what: str) -> str:
        told = {rank: fact for rank, fact in self._waiting.items() if fact.number >= number}
        silent = set(range(self._size)) - {self._rank} - set(told)
        elsewhere = {rank: fact.text for rank, fact in told.items() if fact.text != what and rank != self._rank}
        text = f"rank {self._rank}: waited {self._limit:g} s in {what}"
        if silent:
            text += f" for {ranks(silent)}: stopped, cut off, or busy with something else"
        if elsewhere:
            text += "".join(f"; rank {rank} waits in {its}" for rank, its in sorted(elsewhere.items())[:5])
        return f"{text}. Where steps may take longer, raise timeout= or HVD_SKETCH_TIMEOUT (seconds)"


_roll_calls: list[RollCall] = []
"""Of dropped communicators as well: others may wait there for this rank, and messages be under way."""


def _set_status(error: BaseException) -> None:
    """As ``python -m mpi4py`` does: end all ranks when this one is through with its exit handlers."""
    if ending.aborts and not MPI.Is_finalized():
        set_abort_status(error)


def _horovod_ends_mpi() -> bool:
    """Whether Horovod runs on MPI: it ends it on all ranks, in a thread of its own, as soon as one is through.

    Who waits then knows by that, and to send anything meanwhile would crash.
    """
    horovod = sys.modules.get("horovod.torch")
    return horovod is not None and bool(horovod.is_initialized() and horovod.mpi_enabled())


@atexit.register
def _leave() -> None:
    if ending.failure or not _horovod_ends_mpi():
        for roll_call in _roll_calls:
            roll_call.leave()
    if not ending.failure:
        for roll_call in _roll_calls:
            roll_call.finish()
