"""Messages between two ranks that make progress while both compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from queue import Empty, SimpleQueue

from mpi4py import MPI
from torch import Tensor

from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.errors import ConfigurationError

LARGEST_MESSAGE = 2**31 - 1
"""Bytes; MPI counts in C ints."""

_TAG = 6
_IDLE = 1e-3  # seconds between looks at an empty mailbox
_TRANSFER = 1e-4  # the same while a transfer is under way, which moves on only when MPI is called


class Courier(threading.Thread):
    """Sends and receives this rank's messages in a thread of its own.

    MPI moves a message only while somebody calls MPI, and a rank that computes does not. This
    thread calls it: it looks for messages every millisecond (every tenth of one during a
    transfer), never waits inside MPI, and hands each message to ``receive`` in this thread. So a
    rank answers within about a millisecond whatever its main thread does, and no rank can block
    another. Only this thread uses its duplicate of the communicator, so the caller's own
    messages never meet ours; both threads may be inside MPI, hence ``MPI_THREAD_MULTIPLE``.

    Messages between two ranks may overtake each other when their sizes differ. The duplicate is
    never freed: freeing is collective, and a dead rank would hang it.

    Args:
        comm: an intracommunicator; duplicating it is collective.
        receive: called with the sender and the message, which it gives back to ``buffers``.
        buffers: where messages come from and go to.
        largest: bytes; a message of more stays with its sender, and an empty one is received in its place.
        size: number of ranks, where that is not the communicator's: some may have to be reached by other ways.

    Raises:
        ConfigurationError: when MPI was initialised for fewer threads.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        receive: Callable[[int, Tensor], None],
        buffers: Buffers,
        largest: int = LARGEST_MESSAGE,
        size: int | None = None,
    ) -> None:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ConfigurationError(
                "MPI was initialised without MPI_THREAD_MULTIPLE, so no thread can answer while this rank computes; "
                "import mpi4py before anything else initialises MPI, and leave mpi4py.rc.thread_level at 'multiple'"
            )
        super().__init__(name="hvd_sketch courier", daemon=True)
        self._comm = comm.Dup()
        self._ways: dict[int, MPI.Intercomm] = {}
        self._receive, self._buffers, self._largest = receive, buffers, largest
        self._outbox: SimpleQueue[tuple[int, Tensor]] = SimpleQueue()
        self._sending: list[tuple[MPI.Request, int, Tensor]] = []
        self._receiving: list[tuple[MPI.Request, int, Tensor]] = []
        self._deadline: float | None = None
        self._unreachable: Collection[int] = ()
        self._counting = threading.Lock()
        self.bytes_sent = 0
        self.last_heard = [time.monotonic()] * (comm.size if size is None else size)
        self.failure: BaseException | None = None

    def send(self, to: int, message: Tensor) -> None:
        """Queue a message, from any thread; its buffer is given back when it has left."""
        with self._counting:
            self.bytes_sent += message.numel()
        self._outbox.put((to, message))

    def reach(self, rank: int, way: MPI.Intercomm) -> None:
        """From now on a rank is the process alone on the other side of an intercommunicator, which is ours alone.

        Whoever had this rank in the communicator is not heard any more.
        """
        self.last_heard[rank] = time.monotonic()
        self._ways = {**self._ways, rank: way}

    def stop(self, unreachable: Collection[int], patience: float) -> None:
        """Let everything leave that is not for ``unreachable`` ranks, for at most ``patience`` seconds, and end."""
        self._unreachable = unreachable
        self._deadline = time.monotonic() + patience
        self.join()

    def run(self) -> None:
        """The thread's body; an exception is kept in ``failure`` for the main thread to raise."""
        try:
            while not self._is_over():
                self._turn()
        except BaseException as error:
            self.failure = error

    def _is_over(self) -> bool:
        if self._deadline is None:
            return False
        waiting = any(to not in self._unreachable for _, to, _ in self._sending)
        return time.monotonic() > self._deadline or (self._outbox.empty() and not waiting)

    def _turn(self) -> None:
        pause = _TRANSFER if self._sending or self._receiving else _IDLE
        busy = self._accept() | self._finish_receiving() | self._finish_sending()
        try:
            while True:
                to, message = self._outbox.get(timeout=0 if busy else pause)
                busy = True
                self._sending.append((self._start_sending(to, message), to, message))
        except Empty:
            return

    def _start_sending(self, to: int, message: Tensor) -> MPI.Request:
        way = self._ways.get(to)
        if way is None:
            return self._comm.Isend(message.numpy(), dest=to, tag=_TAG)
        return way.Isend(message.numpy(), dest=0, tag=_TAG)

    def _accept(self) -> bool:
        ways = self._ways
        found = self._accept_by(self._comm, None, ways)
        for rank, way in ways.items():
            found |= self._accept_by(way, rank, ())
        return found

    def _accept_by(self, way: MPI.Comm, rank: int | None, unheard: Collection[int]) -> bool:
        """Begin to receive what has come by one way, of a rank or of all of the communicator but some."""
        status, found = MPI.Status(), False
        while (arriving := way.Improbe(tag=_TAG, status=status)) is not None:
            found = True
            source, nbytes = status.source if rank is None else rank, status.Get_count(MPI.BYTE)
            if source in unheard:
                continue
            if nbytes > self._largest:
                self._receive(source, self._buffers.take(0))
                continue
            buffer = self._buffers.take(nbytes)
            self._receiving.append((arriving.Irecv(buffer.numpy()), source, buffer))
        return found

    def _finish_receiving(self) -> bool:
        done = [item for item in self._receiving if item[0].Test()]
        self._receiving = [item for item in self._receiving if item[0] != MPI.REQUEST_NULL]
        for _, source, message in done:
            self.last_heard[source] = time.monotonic()
            self._receive(source, message)
        return bool(done)

    def _finish_sending(self) -> bool:
        done = [item for item in self._sending if item[0].Test()]
        self._sending = [item for item in self._sending if item[0] != MPI.REQUEST_NULL]
        for _, _, message in done:
            self._buffers.give(message)
        return bool(done)
