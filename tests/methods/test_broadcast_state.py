"""``hvd.broadcast_optimizer_state`` on what every method returns, after rank 0 alone has loaded a checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor

from hvd_sketch.comm import default_communicator
from tests.support.methods import METHODS, fresh, shared, train
from tests.support.ranks import ranks
from tests.support.training import net

RATE = 0.01


class Seen(NamedTuple):
    """Learning rate, whether the optimizer has a state to begin with, and the model after some steps."""

    rate: float
    has_state: bool
    model: Tensor


def every_method() -> dict[str, Seen]:
    hvd.init()
    return {name: resumed(name) for name in METHODS}


def resumed(name: str) -> Seen:
    method = METHODS[name]
    model, optimizer = fresh(method, default_communicator())
    saved = method.optimizer(net(1).parameters())
    for parameter in saved.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    saved.step()
    has_state = bool(saved.state)
    saved.param_groups[0]["lr"] = RATE
    if hvd.rank() == 0 or not has_state:  # without one, Horovod broadcasts nothing
        optimizer.load_state_dict(saved.state_dict())
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    train(optimizer, model, hvd.rank(), range(7))
    return Seen(optimizer.param_groups[0]["lr"], has_state, shared(optimizer, model))


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Seen]]:
    return ranks(2, every_method)


@pytest.mark.parametrize("name", METHODS)
def test_all_ranks_go_on_from_rank_0s_state(seen: list[dict[str, Seen]], name: str) -> None:
    first, second = (one[name] for one in seen)
    assert first.rate == second.rate == RATE
    assert first.has_state == second.has_state
    assert torch.equal(first.model, second.model)
