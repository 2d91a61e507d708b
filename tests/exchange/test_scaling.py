"""One object knows whose scale gradients carry and whom to tell of a void step, and searches once."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.amp import GradScaler

from hvd_sketch.exchange import scaling
from hvd_sketch.exchange.scaling import LossScale
from hvd_sketch.instances import instances_of


class Tells(torch.optim.SGD):
    """Says in every step that it is void, or not, whatever its gradients are."""

    _step_supports_amp_scaling = True  # the scaler leaves it on the optimizer whether gradients are finite

    def __init__(self, scaler: GradScaler | None) -> None:
        super().__init__([torch.nn.Parameter(torch.ones(3))], 0.1)
        self.scale, self.void = LossScale(scaler), True

    def step(self, closure: Any = None) -> Any:
        self.scale.tell(self, void=self.void)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The classes of which all instances were looked for."""
    kinds: list[type] = []

    def noting(kind: type[Any]) -> list[Any]:
        kinds.append(kind)
        return instances_of(kind)

    monkeypatch.setattr(scaling, "instances_of", noting)
    return kinds


def step(scaler: GradScaler, optimizer: Tells) -> float:
    """One step with finite gradients; the scale after it."""
    scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return float(scaler.get_scale())


@pytest.mark.parametrize("told", [True, False], ids=["given", "found"])
def test_the_scaler_that_steps_is_told_and_looked_for_once_at_most(told: bool, searches: list[type]) -> None:
    scaler, other = GradScaler("cpu", init_scale=64.0), GradScaler("cpu", init_scale=64.0)
    other.scale(torch.ones(1))
    optimizer = Tells(scaler if told else None)
    assert [step(scaler, optimizer) for _ in range(3)] == [32.0, 16.0, 8.0]
    assert len(searches) == (0 if told else 1)
    optimizer.void = False
    assert step(scaler, optimizer) == 8.0
    assert other.get_scale() == 64.0


def test_a_scaler_that_has_gone_is_followed_by_another(searches: list[type]) -> None:
    optimizer, first = Tells(None), GradScaler("cpu", init_scale=64.0)
    assert step(first, optimizer) == 32.0
    del first
    gc.collect()
    second = GradScaler("cpu", init_scale=8.0)
    assert [step(second, optimizer) for _ in range(2)] == [4.0, 2.0]
    assert len(searches) == 2
