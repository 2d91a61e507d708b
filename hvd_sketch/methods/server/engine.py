"""One rank's part between a server and its workers, from the beginning to the end of a block."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from hvd_sketch.methods.server.client import Client
from hvd_sketch.methods.server.line import Line
from hvd_sketch.methods.server.message import Kind
from hvd_sketch.methods.server.serving import Serving

_LAST_WORDS = 2.0  # seconds for messages to leave when a rank ends

Item = TypeVar("Item")


class Engine:
    """The server, a worker, or both, on one rank.

    The server's changes are made in the main thread of a dedicated server, in `serve`, or else in a
    thread beside the worker of its rank. There is no collective, so a dead worker cannot hang the others.

    Args:
        line: of this rank.
        serving: on the server's rank, None on all others.
        works: whether the server's rank is a worker as well.
        patience: seconds, to tell of.
    """

    _served: ClassVar[Engine | None] = None  # by this process, without work of its own

    def __init__(self, line: Line, serving: Serving | None, *, works: bool, patience: float) -> None:
        self._line, self._serving = line, serving
        self.store = None if serving is None else serving.store
        self.is_worker = works or serving is None
        self.client = Client(line, patience, self._check)
        self._thread = threading.Thread(target=self._serve_beside, name="hvd_sketch server", daemon=True)
        self._failure: BaseException | None = None
        self._closed = False
        line.start()
        atexit.register(self.leave)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._line.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._line.size

    @property
    def is_over(self) -> bool:
        """Whether this rank has ended its part."""
        return self._closed

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received, of all messages to and from other ranks."""
        return self._line.bytes_sent, self._line.bytes_received

    @property
    def beside_worker(self) -> bool:
        """Whether the caller is the thread that serves beside a worker."""
        return threading.current_thread() is self._thread

    def server_state(self) -> dict[str, Any]:
        """On the server's rank, a copy of its state, between two messages."""
        assert self._serving is not None
        with self._serving.between:
            return self._serving.store.state_dict()

    def begin(self) -> None:
        """The block begins.

        Raises:
            RuntimeError: on a dedicated server in the block of another method, which it could never serve as well.
        """
        if not self.is_worker:
            if Engine._served is not None:
                raise RuntimeError(
                    f"rank {self.rank} is the server of another block, which has not ended: it serves one after the "
                    "other; for two at once let both have server_works=True"
                )
            Engine._served = self
        if self.store is not None:
            self.store.begin()
        if self.store is not None and self.is_worker:
            self._thread.start()

    def work(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, on a worker; none on a dedicated server, which serves here until no worker is left."""
        if self.is_worker:
            yield from items
        else:
            self.serve()

    def serve(self) -> None:
        """On a dedicated server: answer until no worker is left."""
        assert self._serving is not None
        self._serving.serve()

    def finish(self) -> None:
        """The block ends, on all ranks together: workers say that they are done, a server serves until none is left.

        A worker waits, for Open MPI waits at the end of a process too, and for ever where another dies meanwhile.

        Raises:
            ServerLost: when the server ended before.
            RuntimeError: when serving ended by an error.
        """
        if self._closed:
            return
        if self.is_worker:
            self.client.finish()
        if self._serving is None:
            self.client.wait_for_end()
        elif self.is_worker:
            self._thread.join()
            self._check()
        else:
            self.serve()
        self._close()

    def leave(self) -> None:
        """End without waiting, and say so."""
        if not self._closed:
            for rank in self._everybody():
                self._line.tell(rank, Kind.GONE)
            self._close()

    def _close(self) -> None:
        self._closed = True
        if Engine._served is self:
            Engine._served = None
        atexit.unregister(self.leave)
        serving, away = self._serving, {self._line.server} if self.client.done else set()
        if serving is not None:
            serving.stopped = True
            away = serving.lost | serving.gone
        self._line.close(away, _LAST_WORDS)

    def _everybody(self) -> list[int]:
        """Whom it concerns that this rank ends: the server's workers, or a worker's server."""
        if self.store is None:
            return [] if self.client.done else [self._line.server]
        return [worker for worker in self.store.stats.workers if worker != self._line.rank]

    def _serve_beside(self) -> None:
        """A thread's body; an error is kept for the worker beside it, and told the others."""
        try:
            self.serve()
        except BaseException as error:
            self._failure = error
            for rank in self._everybody():
                self._line.tell(rank, Kind.GONE)
            with self._line.condition:
                self._line.condition.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"rank {self._line.rank}: serving ended by an error") from self._failure
