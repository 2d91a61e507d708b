"""The guard: it leaves a healthy run alone, ends a divergence, says so, and decides alike on all ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hvd_sketch
from hvd_sketch import Compression, ConfigurationError, Guard
from hvd_sketch.comm import Communicator
from tests.support.heterogeneous import Model, Seen, loss, simulate

PLAIN: dict[str, Any] = {"clip_norm": None, "dense_below": 0, "half": False}
RATIO = 20.0


def run(steps: int, guard: Callable[[], Any], momentum: float = 0.9) -> list[list[Seen]]:
    """The details of a step are its ratio and the loss after it."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        schedule = guard()
        optimizer: Any = hvd_sketch.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum),
            model.named_parameters(),
            Compression.topk(schedule=schedule, **PLAIN),
            comm=comm,
        )

        def step(number: int) -> Any:
            optimizer.zero_grad()
            ratio = schedule(number)
            loss(model, comm.rank, number).backward()
            optimizer.step()
            return ratio, float(loss(model, comm.rank, number))

        return step

    return simulate(4, steps, body)


def test_a_divergence_ends() -> None:
    """Error feedback at this ratio, learning rate and momentum grows without end; guarded, it does not."""
    unguarded = run(300, lambda: lambda step: RATIO)[0]
    with pytest.warns(UserWarning, match="the ratio backs off"):
        guarded = run(600, lambda: Guard(RATIO))
    assert unguarded[-1].detail[1] > 1000 * unguarded[9].detail[1]
    assert guarded[0][-1].detail[1] < 2 * guarded[0][9].detail[1]
    assert max(seen.detail[1] for seen in guarded[0]) < unguarded[-1].detail[1] / 20
    assert max(seen.detail[0] for seen in guarded[0][150:]) <= RATIO / 2
    for ranks in zip(*guarded, strict=True):
        assert len({seen.detail[0] for seen in ranks}) == 1
        assert all(torch.equal(seen.model, ranks[0].model) for seen in ranks)


def test_a_healthy_run_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = run(200, lambda: Guard(RATIO), momentum=0.0)[0]
    assert {step.detail[0] for step in seen} == {RATIO}


def test_a_backlog_above_the_limit_is_sent() -> None:
    with pytest.warns(UserWarning, match="gradients are unsent"):
        seen = run(100, lambda: Guard(RATIO, backlog=5.0), momentum=0.0)[0]
    assert seen[-1].detail[0] < RATIO


def test_its_state_is_resumed() -> None:
    guard, other = Guard(RATIO), Guard(RATIO)
    assert math.isnan(guard.backlog)
    state = {**guard.state_dict(), "_ratio": 5.0, "_ceiling": 10.0}
    other.load_state_dict(state)
    assert other(0) == 5.0
    assert other.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    "settings", [{"ratio": 1.0}, {"backlog": 0.0}, {"growth": 2.0}, {"every": 0}], ids=lambda s: next(iter(s))
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Guard"):
        Guard(**{"ratio": RATIO, **settings})
