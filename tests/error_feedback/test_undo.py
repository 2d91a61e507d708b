"""A step that was taken back is as if it had never been, for any kind of state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_sketch.error_feedback.undo import Undo
from tests.support import training


class Odd(torch.optim.SGD):
    """Counts in a number and in a parameter group, keeps a list of tensors, and replaces its momentum."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["past"] = [*state.get("past", []), parameter.grad.clone()]
                for old in state["past"]:
                    old.add_(1.0)
                state["momentum"] = state.get("momentum", 0.0) + parameter.grad.clone()
        return None


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.1, momentum=0.9, centered=True),
    "odd": lambda parameters: Odd(parameters, 0.1),
}


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_the_state_is_what_it_was(kind: str, steps_before: int) -> None:
    model = training.net()
    optimizer = MAKERS[kind](model.parameters())
    undo = Undo(optimizer)

    def step(number: int) -> None:
        optimizer.zero_grad()
        training.loss(model, 0, number).backward()
        undo.note()
        optimizer.step()

    for number in range(steps_before):
        step(number)
    before = copy.deepcopy(optimizer.state_dict()["state"]), len(optimizer.state)
    step(steps_before)
    undo.restore()
    state = optimizer.state_dict()["state"]
    assert (len(state), len(optimizer.state)) == (len(before[0]), before[1])
    for owner, noted in before[0].items():
        assert state[owner].keys() == noted.keys()
        for key, value in noted.items():
            torch.testing.assert_close(state[owner][key], value, rtol=0, atol=0)
    assert all(group.get("seen", 0) in (0, steps_before) for group in optimizer.param_groups)
