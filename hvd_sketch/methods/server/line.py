"""A rank's line to the others: messages that arrive while it computes, and pings that are answered at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor

from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.server.message import HEADER, LONGEST_REASON, Header, Kind
from hvd_sketch.methods.server.place import Place
from hvd_sketch.methods.server.watch import Watch

_FOR_WORKERS = (Kind.MODEL, Kind.END, Kind.ABORT)


class Letter(NamedTuple):
    """A message that has come, and when, ``time.monotonic()``."""

    source: int
    message: Tensor
    at: float


Deliver = Callable[[Letter], None]


class _Fresh(Buffers):
    """Keeps no buffer: sizes differ from message to message, and come from strangers."""

    def give(self, buffer: Tensor) -> None:
        return


class Line:
    """Sends and receives in a thread of this rank's own (`hvd_sketch.comm.peer.Courier`).

    Pings are answered there. What is for a server, and what is for a worker, is handed to those that are
    on this rank, with `condition` held, and then the condition is notified. A message to this
    rank itself takes the same way, but for the network.

    Args:
        here: this rank's place; duplicating its communicator is collective.
        nbytes: no payload is larger; a message that is stays with its sender.
        patience: see `Watch`.
        server: the server's rank.
    """

    def __init__(self, here: Place, *, nbytes: int, patience: float, server: int) -> None:
        from hvd_sketch.comm.peer import LARGEST_MESSAGE, Courier

        largest = max(nbytes, LONGEST_REASON) + HEADER
        if largest > LARGEST_MESSAGE:
            raise ConfigurationError(
                f"a message of this model may take {largest} bytes, but one MPI message carries "
                f"{LARGEST_MESSAGE} at most: freeze parameters, or use a method with an allreduce"
            )
        self.rank, self.size, self.server = here.rank, here.size, server
        self.condition = threading.Condition()
        self.bytes_received = 0
        self.to_server: Deliver | None = None
        self.to_worker: Deliver | None = None
        self._courier = Courier(here.comm, self._receive, _Fresh(), largest, here.size)
        if here.way is not None:
            self._courier.reach(server, here.way)
        self.watch = Watch(self._courier.last_heard, lambda rank: self.tell(rank, Kind.PING), patience)

    def start(self) -> None:
        """Begin, when `to_server` and `to_worker` are set: others may send at once."""
        self._courier.start()

    @property
    def bytes_sent(self) -> int:
        """Of all messages to other ranks."""
        return self._courier.bytes_sent

    def tell(self, to: int, kind: Kind) -> None:
        """Send a message without payload, from any thread."""
        self.send(to, Header(kind).write())

    def send(self, to: int, message: Tensor) -> None:
        """Send a message, from any thread; it is not to be changed any more."""
        if to == self.rank:
            self._hand_on(Letter(to, message, time.monotonic()))
        else:
            self._courier.send(to, message)

    def reach(self, rank: int, way: Any) -> None:
        """A rank is another process from now on, see `Courier.reach`."""
        self._courier.reach(rank, way)

    def check(self) -> None:
        """Raise what went wrong in the courier's thread."""
        if self._courier.failure is not None:
            raise RuntimeError(f"rank {self.rank}: the courier ended by an error") from self._courier.failure

    def close(self, unreachable: Collection[int], patience: float) -> None:
        """Let what is not for ``unreachable`` ranks leave, for at most ``patience`` seconds, and end."""
        self._courier.stop(unreachable, patience)

    def _receive(self, source: int, message: Tensor) -> None:
        """In the courier's thread: hand a message to whom it concerns."""
        self.bytes_received += message.numel()
        kind = int(message[0]) if message.numel() else 0
        if kind == Kind.PING:
            self.tell(source, Kind.PONG)
        elif kind != Kind.PONG:
            self._hand_on(Letter(source, message, time.monotonic()))

    def _hand_on(self, letter: Letter) -> None:
        deliver = self.to_worker if self._is_servers(letter) else self.to_server
        if deliver is not None:
            with self.condition:
                deliver(letter)
                self.condition.notify_all()

    def _is_servers(self, letter: Letter) -> bool:
        """Whether the server sent it; what a server's rank sends to itself may be its worker's as well."""
        if letter.source != self.server:
            return False
        return self.rank != self.server or int(letter.message[0]) in _FOR_WORKERS
