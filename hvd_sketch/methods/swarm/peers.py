"""Who is still there: silence, death, and what to do about it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Collection
from typing import Literal, Protocol

from torch import Tensor

from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.errors import RankMismatchError
from hvd_sketch.methods.swarm.message import HEADER, Header, Kind

OnLost = Literal["raise", "continue"]


class PeerLost(RuntimeError):
    """A node has ended or does not answer any more."""


class Post(Protocol):
    """What is needed of `hvd_sketch.comm.peer.Courier`."""

    last_heard: list[float]
    failure: BaseException | None

    def send(self, to: int, message: Tensor) -> None: ...


class Peers:
    """The other nodes as this one sees them, and the only way to wait for one of them.

    A node that lives answers a ping within about a millisecond, however slow its training is.
    While this node waits for one that stays silent it sends pings; after ``patience`` seconds
    without any message the other counts as lost: an error, or nobody waits for it or calls on it
    until it is heard again.

    Args:
        condition: notified after every message; held by the callers of all methods but `wait`.
    """

    def __init__(
        self,
        post: Post,
        buffers: Buffers,
        condition: threading.Condition,
        rank: int,
        size: int,
        patience: float,
        on_lost: OnLost,
    ) -> None:
        self._post, self._buffers, self._condition = post, buffers, condition
        self.rank, self.size = rank, size
        self._patience, self._on_lost = patience, on_lost
        self._last_ping = [0.0] * size
        self.lost: set[int] = set()
        self.gone: set[int] = set()
        self._damaged: int | None = None

    def present(self, ranks: Collection[int]) -> list[int]:
        """Those of ``ranks`` that are not known to be away."""
        return [rank for rank in ranks if rank not in self.lost and rank not in self.gone]

    def heard(self, source: int, kind: Kind) -> None:
        """Note a message: its sender is there, or says that it leaves."""
        self.lost.discard(source)
        if kind == Kind.GONE:
            self.gone.add(source)

    def note_damage(self, source: int) -> None:
        """What came from a node is not what it sent: this node goes on no further."""
        self._damaged = source
        self._condition.notify_all()

    def tell(self, to: int, kind: Kind, number: int = 0) -> None:
        """Send a message without payload."""
        self._post.send(to, Header(kind, number).write(self._buffers.take(HEADER)))

    def check(self) -> None:
        """Raise what went wrong in the background.

        Raises:
            RuntimeError: from the courier's own error.
            RankMismatchError: when a message was damaged.
            PeerLost: when a node said that it leaves, unless that is to be ignored.
        """
        if self._post.failure is not None:
            raise RuntimeError(f"rank {self.rank}: the courier ended by an error") from self._post.failure
        if self._damaged is not None:
            raise RankMismatchError(
                f"rank {self.rank}: a message of rank {self._damaged} was damaged on its way, and was not taken in; "
                "look at the network between them, and go on from a checkpoint"
            )
        if self.gone and self._on_lost == "raise":
            raise PeerLost(
                f"rank {self.rank}: rank {min(self.gone)} has ended without finish(), probably by an error; "
                "on_lost='continue' would carry on without it"
            )

    def wait(self, done: Callable[[], bool], awaited: Callable[[], Collection[int]]) -> None:
        """Wait until ``done()``, or until none of the ``awaited()`` ranks is present.

        Raises:
            PeerLost: when one of them is silent for too long or has left, unless that is to be ignored.
        """
        began, tick = time.monotonic(), self._patience / 8
        with self._condition:
            while not done():
                self.check()
                waiting = self.present(awaited())
                if not waiting:
                    return
                for rank in waiting:
                    self._watch(rank, max(began, self._post.last_heard[rank]), tick)
                self._condition.wait(tick)

    def _watch(self, rank: int, since: float, tick: float) -> None:
        now = time.monotonic()
        if now - since > self._patience:
            self._lose(rank)
        elif now - since >= tick / 2 and now - self._last_ping[rank] >= tick / 2:
            self._last_ping[rank] = now
            self.tell(rank, Kind.PING)

    def _lose(self, rank: int) -> None:
        text = (
            f"rank {self.rank}: rank {rank} has not answered for {self._patience:g} s (patience); "
            "its process is dead or stopped, or the network between is cut"
        )
        if self._on_lost == "raise":
            raise PeerLost(f"{text}; on_lost='continue' would carry on without it")
        warnings.warn(f"{text}; carrying on without it", RuntimeWarning, stacklevel=2)
        self.lost.add(rank)
