"""Objects are found by their class alone."""

from __future__ import annotations

import threading
import time

from torch.amp import GradScaler

from hvd_sketch.instances import instances_of


class Own(GradScaler):
    """A subclass counts."""


def test_all_that_live_are_found_and_no_others() -> None:
    one, other = GradScaler("cpu"), Own("cpu")
    found = {id(scaler) for scaler in instances_of(GradScaler)}
    assert {id(one), id(other)} <= found
    assert [id(scaler) for scaler in instances_of(Own)] == [id(other)]
    del other
    assert instances_of(Own) == []


def test_tuples_that_other_threads_are_making_come_out_whole() -> None:
    made: list[int] = []

    def slowly() -> int:
        time.sleep(1e-4)
        return 1

    def make() -> None:
        made.append(len(tuple(slowly() for _ in range(200))))

    thread = threading.Thread(target=make)
    thread.start()
    while thread.is_alive():
        instances_of(GradScaler)
    assert made == [200]
