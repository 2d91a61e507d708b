"""The server's side of the messages: it takes what comes in the order in which it comes, and answers."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable

import torch

from hvd_sketch.methods.server.errors import WorkersLost
from hvd_sketch.methods.server.line import Letter, Line
from hvd_sketch.methods.server.message import LONGEST_REASON, Header, Kind, Note, Unreadable
from hvd_sketch.methods.server.place import Restarts
from hvd_sketch.methods.server.store import ProtocolError, Replies, Store

_STARTING = 120.0  # seconds in which a worker that is started again must join
_MOST_LETTERS = 2  # of one worker: it waits for the answer to each, but may end meanwhile


class Serving:
    """Serves a store until no worker is left.

    A worker that gives no sign of life for ``patience`` seconds counts as lost, which is told by a
    warning, and is waited for no longer; what it sends later counts again. One whose messages cannot
    be right is told why, and not listened to any more.

    Args:
        line: of this rank.
        store: what is served.
        restarts: how often a lost worker is started again, see `Restarts`.
        on_change: called with the version after every change, by whoever serves.
    """

    def __init__(
        self, line: Line, store: Store, *, restarts: int = 0, on_change: Callable[[int], None] | None = None
    ) -> None:
        self._line, self.store, self._on_change = line, store, on_change
        self._restarts = Restarts(restarts, line.size, line.reach)
        self._starting: dict[int, float] = {}
        self._inbox: deque[Letter] = deque()
        self.done: set[int] = set()
        self.lost: set[int] = set()
        self.gone: set[int] = set()
        self.between = threading.Lock()
        """Free between two messages."""
        self.stopped = False
        line.to_server = self._deliver

    def serve(self) -> None:
        """Answer until every worker has done its part, is lost, has gone, or was turned away, or until `stopped`.

        Raises:
            WorkersLost: when none had done its part.
            RuntimeError: for an error of the courier.
        """
        while self._remaining() and not self.stopped:
            self._line.check()
            self._give_up_starting()
            for worker in self._line.watch.silent(self._watched()):
                self._lose(worker)
            with self._line.condition:
                if not self._inbox:
                    self._line.condition.wait(self._line.watch.tick)
                letters = [self._inbox.popleft() for _ in range(len(self._inbox))]
            for letter in letters:
                self._handle(letter)
        for worker in self.done | self.lost:
            self._line.tell(worker, Kind.END)
        if not self.done:
            raise WorkersLost(f"rank {self._line.rank}: none of the {len(self.store.stats.workers)} workers is left")

    def _remaining(self) -> list[int]:
        """Those to wait for; of these some may be on their way."""
        away = self.done | (self.lost | self.gone) - self._starting.keys()
        return [rank for rank in self.store.stats.workers if rank not in away]

    def _watched(self) -> list[int]:
        return [rank for rank in self._remaining() if rank not in self._starting and rank != self._line.rank]

    def _give_up_starting(self) -> None:
        now, failed = time.monotonic(), self._restarts.failed
        for worker in [rank for rank, deadline in self._starting.items() if rank in failed or now > deadline]:
            del self._starting[worker]
            self._warn(f"worker {worker} was to be started again, but has not joined; going on without it")

    def _start_again(self, worker: int) -> None:
        if self._restarts.begin(worker):
            self._starting[worker] = time.monotonic() + _STARTING

    def _warn(self, text: str) -> None:
        warnings.warn(f"rank {self._line.rank}: {text}", RuntimeWarning, stacklevel=3)

    def _deliver(self, letter: Letter) -> None:
        """In the courier's thread."""
        if sum(waiting.source == letter.source for waiting in self._inbox) < _MOST_LETTERS:
            self._inbox.append(letter)

    def _handle(self, letter: Letter) -> None:
        if letter.source in self.gone and letter.source not in self._starting:
            return
        self.lost.discard(letter.source)
        before = self.store.version
        with self.between:
            try:
                header, payload, intact = Header.read(letter.message)
                replies = self._act(letter.source, header, payload, intact, letter.at)
            except (ProtocolError, Unreadable) as error:
                replies = self._turn_away(letter.source, str(error), letter.at)
        self._send(replies)
        if self._on_change is not None and self.store.version != before:
            self._on_change(self.store.version)

    def _act(self, source: int, header: Header, payload: torch.Tensor, intact: bool, at: float) -> Replies:
        if header.kind == Kind.PUSH:
            return self.store.push(source, header, payload, intact, at)
        if not intact:
            raise ProtocolError("a message without a payload was damaged")
        if header.kind == Kind.JOIN:
            self.done.discard(source)
            self.gone.discard(source)
            self._starting.pop(source, None)
            return self.store.join(source, header.number, header.note == Note.FRESH, at)
        if header.kind == Kind.PULL:
            return [(source, self.store.look())]
        if header.kind == Kind.DONE:
            self.done.add(source)
            return self.store.leave(source, False, at)
        if header.kind == Kind.GONE:
            self._warn(f"worker {source} has ended by an error; going on without it")
            self.gone.add(source)
            self._start_again(source)
            return self.store.leave(source, True, at)
        raise ProtocolError(f"workers send no {header.kind.name}")

    def _turn_away(self, source: int, reason: str, at: float) -> Replies:
        self._warn(f"worker {source} is turned away: {reason}")
        self.gone.add(source)
        told = Header(Kind.ABORT).write(
            torch.frombuffer(bytearray(reason.encode()[:LONGEST_REASON]), dtype=torch.uint8)
        )
        return [(source, told), *self.store.leave(source, True, at)]

    def _lose(self, worker: int) -> None:
        self._warn(
            f"worker {worker} does not answer any more (patience); its process is dead or stopped, or the network "
            "between is cut; going on without it"
        )
        self.lost.add(worker)
        self._start_again(worker)
        with self.between:
            replies = self.store.leave(worker, True, time.monotonic())
        self._send(replies)

    def _send(self, replies: Replies) -> None:
        for worker, message in replies:
            self._line.send(worker, message)
