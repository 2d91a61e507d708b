"""Schedules: which ratio applies when, and what cannot be one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.schedules.base import Schedule, constant, exponential, linear, per_epoch, warmup
from tests.support.simulation import heavy_tailed, simulate

RATIOS = st.floats(1.0, 1e4)


@given(RATIOS, RATIOS, st.integers(0, 300), st.integers(1, 9))
def test_a_ramp_starts_and_ends_where_it_says_and_never_turns(
    start: float, end: float, steps: int, stages: int
) -> None:
    for schedule in (linear(start, end, steps, stages), exponential(start, end, steps, stages)):
        ratios = [schedule(step) for step in range(steps + 2)]
        assert ratios[steps:] == [end, end]
        assert ratios == sorted(ratios, reverse=end < start) or max(ratios) - min(ratios) < 1e-9 * max(ratios)
        assert len(set(ratios)) <= stages + 1
        if steps:
            assert ratios[0] == pytest.approx(start)


@given(RATIOS, st.integers(1, 300), st.integers(1, 9))
def test_warmup_is_exponential_from_dense(ratio: float, steps: int, stages: int) -> None:
    schedule = warmup(ratio, steps, stages)
    assert [schedule(step) for step in range(steps)] == [
        pytest.approx(ratio ** (step * stages // steps / stages)) for step in range(steps)
    ]


def test_known_values() -> None:
    assert [linear(1, 9, 4)(step) for step in range(6)] == [1, 3, 5, 7, 9, 9]
    assert [exponential(1, 16, 4)(step) for step in range(6)] == [1, 2, 4, 8, 16, 16]
    assert [per_epoch([4, 16], 3)(step) for step in (0, 2, 3, 5, 6, 99)] == [4, 4, 16, 16, 16, 16]
    assert constant(7)(123) == 7


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(0.5),
        lambda: linear(0.5, 4, 10),
        lambda: linear(2, float("nan"), 10),
        lambda: exponential(1, 4, -1),
        lambda: warmup(4, 10, 0),
        lambda: per_epoch([], 10),
        lambda: per_epoch([4, 0], 10),
        lambda: per_epoch([4], 0),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(make: Callable[[], Schedule]) -> None:
    with pytest.raises(ConfigurationError, match="ratio|steps"):
        make()


def test_the_exchange_follows_it() -> None:
    schedule = per_epoch([1, 8], 2)
    gradients = heavy_tailed(2, 4, 5470)
    runs = simulate(Compression.topk(schedule=schedule, clip_norm=None), gradients)
    sent = [int(update.count_nonzero()) for update in runs[0].updates]
    assert sent[0] > 5000
    assert max(sent[2:]) < 5470 // 4
