"""Some seconds of what `make soak` does for minutes."""

from tests.soak.rounds import Held, growing, soak
from tests.support.ranks import ranks


def test_memory_threads_and_files_stay_while_optimizers_are_made_and_dropped() -> None:
    for seen in ranks(2, soak, 5.0, False):
        assert growing(seen) is None


def test_what_grows_is_told() -> None:
    flat = [Held(1 << 30, 5, 20)] * 20
    assert growing(flat) is None
    for number, step in enumerate((1 << 20, 1, 1)):
        grown = [held._replace(**{held._fields[number]: held[number] + step * i}) for i, held in enumerate(flat)]
        assert growing(grown) is not None
