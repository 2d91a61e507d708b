"""Whether ranks are still there."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

_LOOKS = 16  # in the time of one's patience


class Watch:
    """Asks ranks that have been silent for a while for a sign of life.

    A rank that lives answers a ping within about a millisecond, however slow its training is. Only
    silence after a ping counts, so a watcher that was busy itself loses nobody by that. A ping is sent early
    enough that a dead rank is known as such ``patience`` seconds after it was heard last.

    Args:
        last_heard: when each rank was last heard, ``time.monotonic()``; kept up to date by others.
        ping: sends a rank a message that it answers.
        patience: seconds from the last sign of life to the verdict, at most.
    """

    def __init__(self, last_heard: Sequence[float], ping: Callable[[int], None], patience: float) -> None:
        self._last_heard, self._ping = last_heard, ping
        self._asked: dict[int, float] = {}
        self.tick = patience / _LOOKS
        """Look at least this often, in seconds."""
        self._wait = patience - 3 * self.tick  # a ping is two looks late at most, and its silence one

    def silent(self, ranks: Collection[int]) -> list[int]:
        """Those of ``ranks`` that have not answered a ping for long enough; pings those that are due."""
        now, silent = time.monotonic(), []
        for rank in ranks:
            heard, asked = self._last_heard[rank], self._asked.get(rank, 0.0)
            if heard >= asked:
                if now - heard >= self.tick:
                    self._asked[rank] = now
                    self._ping(rank)
            elif now - asked > self._wait:
                silent.append(rank)
        return silent
