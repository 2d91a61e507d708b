"""Who is silent for too long, on a clock of the test's own."""

from __future__ import annotations

import time

import pytest

from hvd_sketch.methods.server.watch import Watch

PATIENCE = 16.0


class World:
    """Two ranks; one dies, the other answers pings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.heard, self.pings = 100.0, [100.0, 100.0], 0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.watch = Watch(self.heard, self._ping, PATIENCE)

    def _ping(self, rank: int) -> None:
        self.pings += rank
        if rank == 0:
            self.heard[0] = self.now


@pytest.mark.parametrize("late", [0.0, 0.3, 0.9])
def test_a_dead_rank_is_known_within_patience_and_a_living_one_is_never_lost(
    monkeypatch: pytest.MonkeyPatch, late: float
) -> None:
    world = World(monkeypatch)
    world.now += late * world.watch.tick  # the looks and the last sign of life fall anyhow
    silent: list[int] = []
    while not silent:
        world.now += 0.999 * world.watch.tick
        silent = world.watch.silent((0, 1))
    assert silent == [1]
    assert PATIENCE / 2 < world.now - 100.0 <= PATIENCE
    assert world.pings == 1


def test_a_watcher_that_was_busy_itself_loses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.now += 10 * PATIENCE
    assert world.watch.silent((0, 1)) == []
