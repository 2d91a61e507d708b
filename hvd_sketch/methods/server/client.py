"""A worker's side of the messages: it asks, and waits for the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from hvd_sketch.methods.server.errors import ServerLost, TurnedAway
from hvd_sketch.methods.server.line import Letter, Line
from hvd_sketch.methods.server.message import Header, Kind, Note, Unreadable


class Client:
    """Asks the server, one thing at a time.

    Args:
        line: of this rank.
        patience: seconds, to tell of.
        check: raises what went wrong on this rank's own server, if it has one.
    """

    def __init__(self, line: Line, patience: float, check: Callable[[], None]) -> None:
        self._line, self._patience, self._check = line, patience, check
        self._letters: deque[Letter] = deque()
        self.done = False
        line.to_worker = self._deliver

    def join(self, moment: int, *, fresh: bool) -> tuple[Header, Tensor]:
        """The whole model, to begin with."""
        return self._ask(Header(Kind.JOIN, moment, note=Note.FRESH if fresh else Note.NOTHING).write())

    def push(self, version: int, code: int, payload: Tensor) -> tuple[Header, Tensor]:
        """Send an update that began at a version; the model after it."""
        return self._ask(Header(Kind.PUSH, version, code).write(payload))

    def pull(self) -> tuple[Header, Tensor]:
        """The whole model, to look at."""
        return self._ask(Header(Kind.PULL).write())

    def finish(self) -> None:
        """Say that no more pushes come."""
        self._line.tell(self._line.server, Kind.DONE)
        self.done = True

    def wait_for_end(self) -> None:
        """Wait until everybody has done their part.

        Raises:
            ServerLost: when the server ended before, or is silent for too long.
        """
        self._read(self._await())

    def _ask(self, message: Tensor) -> tuple[Header, Tensor]:
        """Send, and wait for the model.

        Raises:
            ServerLost: when the server has ended, or is silent for too long.
            TurnedAway: when it does not take this worker's messages.
            RuntimeError: when this worker is done, or the answer was damaged.
        """
        if self.done:
            raise RuntimeError("this worker has said that it is done: the server may have ended")
        self._line.send(self._line.server, message)
        header, payload = self._read(self._await())
        if header.kind != Kind.MODEL:
            self.done = True
            raise ServerLost(f"rank {self._line.rank}: the server has ended: all other workers had done their part")
        return header, payload

    def _read(self, letter: Letter) -> tuple[Header, Tensor]:
        rank = self._line.rank
        try:
            header, payload, intact = Header.read(letter.message)
        except Unreadable as error:
            raise RuntimeError(f"rank {rank}: a message from the server was damaged: {error}") from None
        if not intact:
            raise RuntimeError(f"rank {rank}: a message from the server was damaged on the way")
        if header.kind == Kind.ABORT:
            self.done = True
            told = payload.numpy().tobytes().decode(errors="replace")
            raise TurnedAway(f"rank {rank}: the server turned this worker away: {told}")
        if header.kind == Kind.GONE:
            self.done = True
            raise ServerLost(f"rank {rank}: the server, rank {self._line.server}, has ended by an error")
        return header, payload

    def _await(self) -> Letter:
        line = self._line
        with line.condition:
            while not self._letters:
                line.check()
                self._check()
                if line.server != line.rank and line.watch.silent([line.server]):
                    self.done = True
                    raise ServerLost(
                        f"rank {line.rank}: the server, rank {line.server}, has not answered for {self._patience:g} s "
                        "(patience); its process is dead or stopped, or the network between is cut. There is no "
                        "other server: begin again from its checkpoint"
                    )
                line.condition.wait(line.watch.tick)
            return self._letters.popleft()

    def _deliver(self, letter: Letter) -> None:
        self._letters.append(letter)
