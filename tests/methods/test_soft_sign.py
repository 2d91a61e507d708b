"""The soft sign step: its formula, its rate, what it takes over, and training of mixed coefficients with it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch
from hvd_sketch import Compression, SoftSign
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.errors import ConfigurationError
from tests.support.training import flat, net, train

MIXED = Compression.mixed(ratio=20.0)


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **settings})


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, **settings})


def one(values: Tensor, make: Any, gradient: Tensor) -> Tensor:
    """Where one step takes a parameter."""
    parameter = nn.Parameter(values.clone())
    parameter.grad = gradient.clone()
    SoftSign(make(parameter)).step()
    return parameter.detach()


@pytest.mark.parametrize("maximize", [False, True])
def test_a_step_with_adamw_is_the_formula(maximize: bool) -> None:
    values, gradient = torch.randn(2, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = one(values, lambda p: torch.optim.AdamW([p], lr=0.01, weight_decay=0.1, maximize=maximize), gradient)
    size = gradient.square().mean().sqrt()
    direction = 1.4 * gradient / (gradient.abs() + 0.5 * size)
    rate = 9 * 0.01 * math.sqrt(0.1 / 1.9) * (-1 if maximize else 1)
    torch.testing.assert_close(moved, values * (1 - 0.01 * 0.1) - rate * direction)


def test_a_step_with_sgd_follows_the_size_of_the_gradients() -> None:
    """Smoothed over steps, of all parameters together."""
    first, second = nn.Parameter(torch.zeros(30)), nn.Parameter(torch.zeros(10))
    optimizer = SoftSign(torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1, momentum=0.9))
    gradients = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    size = None
    for gradient in gradients:
        before = first.detach().clone()
        first.grad, second.grad = gradient[:30].clone(), gradient[30:].clone()
        optimizer.step()
        now = float(gradient.square().mean().sqrt())
        size = now if size is None else 0.95 * size + 0.05 * now
        own = gradient[:30]
        direction = 1.4 * own / (own.abs() + 0.5 * own.square().mean().sqrt())
        rate = 9 * 0.1 * size / math.sqrt(1 - 0.81)
        torch.testing.assert_close(first.detach(), before - rate * direction)


def test_weight_decay_of_sgd_acts_as_its_momentum_would_let_it() -> None:
    moved = one(torch.ones(5), lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.02), torch.zeros(5))
    torch.testing.assert_close(moved, torch.full((5,), 1 - 0.1 * 0.02 / 0.1))


def test_the_scale_of_a_gradient_does_not_matter_and_nothing_moves_without_one() -> None:
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(1))
    moved = [one(torch.zeros(50), lambda p: torch.optim.AdamW([p]), gradient * scale) for scale in (1.0, 2.0**40)]
    torch.testing.assert_close(*moved)
    assert torch.equal(one(torch.ones(5), lambda p: torch.optim.Adam([p]), torch.zeros(5)), torch.ones(5))
    parameter = nn.Parameter(torch.ones(3))
    SoftSign(torch.optim.SGD([parameter], lr=0.1)).step()
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_it_shares_groups_schedule_and_state_with_the_users_optimizer() -> None:
    model = net()
    inner = adamw(model)
    optimizer = SoftSign(inner)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
    optimizer.step()
    inner.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    saved = copy.deepcopy(optimizer.state_dict())
    inner.param_groups[0]["lr"] = 1.0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups is inner.param_groups
    assert inner.param_groups[0]["lr"] == 0.005
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups is copied.optimizer.param_groups
    assert (copied.gain, copied.softness) == (1.4, 0.5)


@pytest.mark.parametrize("make", [adamw, sgd])
def test_ranks_stay_alike_and_training_resumes_to_the_bit(make: Any) -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        def fresh() -> tuple[nn.Module, Any]:
            model = net()
            named = model.named_parameters()
            return model, hvd_sketch.DistributedOptimizer(SoftSign(make(model)), named, MIXED, comm=comm)

        model, optimizer = fresh()
        train(optimizer, model, 12, comm.rank)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.memory_state_dict()))
        whole = train(optimizer, model, range(12, 20), comm.rank)
        model, optimizer = fresh()
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        optimizer.memory_state_dict()
        optimizer.load_memory_state_dict(saved[2])
        return whole, train(optimizer, model, range(12, 20), comm.rank)

    found = run_in_process(3, body)
    for whole, resumed in found:
        assert torch.equal(whole, found[0][0])
        assert torch.equal(resumed, whole)
    assert not torch.equal(found[0][0], flat(net()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: SoftSign(torch.optim.RMSprop([p])), "takes its rate from .*not from RMSprop"),
        (lambda p: SoftSign(torch.optim.Adam([p], weight_decay=0.1)), "use AdamW"),
        (lambda p: SoftSign(torch.optim.AdamW([p]), gain=0.0), "gain must be above 0, got 0.0"),
        (lambda p: SoftSign(torch.optim.AdamW([p]), softness=math.nan), "softness must be above 0, got nan"),
        (
            lambda p: hvd_sketch.DistributedOptimizer(
                SoftSign(torch.optim.AdamW([p])), [("p", p)], Compression.mixed(anticipate=True)
            ),
            "anticipate=True needs .*this is SoftSign",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        make(nn.Parameter(torch.zeros(64, 64)))
