"""What a saved state is compared with: every kind of difference is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hvd_sketch.saved import Equal, Maybe, Vector, differences, unfit

FORM = {
    "kind": Equal("TopK"),
    "step": int,
    "rate": Maybe(float),
    "scales": [(Maybe(float), Maybe(Vector(torch.float32)))],
    "memory": {"residual": torch.zeros(4)},
    "anything": object,
}
STATE: dict[str, Any] = {
    "kind": "TopK",
    "step": 3,
    "rate": 1,
    "scales": [[None, torch.ones(7)]],
    "memory": {"residual": torch.tensor([1.0, -2.0, 3.0, 4.0])},
    "anything": {"of": "the user's own"},
}


def test_what_fits_is_let_through() -> None:
    assert not list(differences(STATE, FORM))
    assert not list(differences({**STATE, "rate": float("nan")}, FORM))
    assert unfit(STATE, FORM) is None


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("kind",), "Sketch", "kind is 'Sketch', here 'TopK'"),
        (("step",), -1, "step is -1"),
        (("step",), True, "step is of type bool, not int"),
        (("step",), 2.5, "step is of type float, not int"),
        (("rate",), float("inf"), "rate is inf"),
        (("scales",), [], "scales has 0 entries, here 1"),
        (("scales",), None, "scales is None, not a list"),
        (("scales", 0, 1), torch.ones(2, 2), "scales[0][1] is a tensor float32[2, 2], here a tensor float32[any]"),
        (("memory",), 7, "memory is of type int, not a dict"),
        (("memory", "residual"), None, "memory.residual is None, not a tensor"),
        (("memory", "residual"), torch.zeros(5), "memory.residual is a tensor float32[5], here a tensor float32[4]"),
        (("memory", "residual"), torch.zeros(4).half(), "memory.residual is a tensor float16[4], here"),
        (
            ("memory", "residual"),
            torch.tensor([1.0, 2.0, 3.0, float("nan")]),
            "residual has values that are not finite",
        ),
        (("memory", "residual"), torch.tensor([1.0, -float("inf"), 3.0, 4.0]), "residual has values that are not fin"),
        (("memory", "velocity"), torch.zeros(4), "memory has 'velocity', which is unknown here"),
    ],
)
def test_what_does_not_fit_is_told(path: tuple[Any, ...], value: Any, told: str) -> None:
    state = copy.deepcopy(STATE)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (found,) = differences(state, FORM)
    assert told in found


def test_a_missing_entry_and_no_dict_at_all_are_told() -> None:
    assert list(differences({key: STATE[key] for key in STATE if key != "step"}, FORM)) == ["the state has no 'step'"]
    assert list(differences(None, FORM)) == ["the state is None, not a dict"]


def test_of_many_differences_the_first_are_told_with_the_remedy() -> None:
    told = unfit({}, FORM)
    assert told is not None
    assert "the state has no 'kind'" in told
    assert "and 1 more" in told
    assert "flush() one step before saving, and load none" in told
