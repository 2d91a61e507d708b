"""Whether ranks are still there."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence


class Watch:
    """Asks ranks that have been silent for a while for a sign of life.

    A rank that lives answers a ping within about a millisecond, however slow its training is. Only
    silence after a ping counts, so a watcher that was busy itself loses nobody by that.

    Args:
        last_heard: when each rank was last heard, ``time.monotonic()``; kept up to date by others.
        ping: sends a rank a message that it answers.
        patience: seconds.
    """

    def __init__(self, last_heard: Sequence[float], ping: Callable[[int], None], patience: float) -> None:
        self._last_heard, self._ping, self._patience = last_heard, ping, patience
        self._asked: dict[int, float] = {}
        self.tick = patience / 8
        """Look at least this often, in seconds."""

    def silent(self, ranks: Collection[int]) -> list[int]:
        """Those of ``ranks`` that have not answered a ping for ``patience`` seconds; pings those that are due."""
        now, silent = time.monotonic(), []
        for rank in ranks:
            heard, asked = self._last_heard[rank], self._asked.get(rank, 0.0)
            if heard >= asked:
                if now - heard >= self.tick:
                    self._asked[rank] = now
                    self._ping(rank)
            elif now - asked > self._patience:
                silent.append(rank)
        return silent
