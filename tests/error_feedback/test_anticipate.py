"""Anticipating error feedback: where gradients are taken, that the step is the ordinary one, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import hvd_sketch
from hvd_sketch import Anticipate, Compression, ConfigurationError, FactoredMoments
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.anticipate import respond
from tests.support import training
from tests.support.heterogeneous import Model, Seen, loss, simulate, vector
from tests.support.ranks import ranks

PLAIN: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None, "dense_below": 100}
TOPK, SHARDED = Compression.topk(ratio=10.0, half=False, **PLAIN), Compression.sharded(ratio=10.0, half=False, **PLAIN)
LR = 0.05
Make = Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR)


def run(
    size: int, compressor: Compressor, make: Make, feedback: Anticipate | None, steps: int = 12
) -> list[list[Seen]]:
    """The details of a step: the memory after it, where its gradient was taken, and measured shares."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        optimizer: Any = hvd_sketch.DistributedOptimizer(
            make(model.parameters()), model.named_parameters(), compressor, comm=comm, error_feedback=feedback
        )

        def step(number: int) -> Any:
            optimizer.zero_grad()
            if feedback is None:
                loss(model, comm.rank, number).backward()
                point = vector(model)
            else:
                with optimizer.step_ahead():
                    point = vector(model)
                    loss(model, comm.rank, number).backward()
            optimizer.step()
            shares = [observer.shares.double() for observer in optimizer.exchange.observers]
            return optimizer.exchange.memory.residual.double().clone(), point, *shares

        return step

    return simulate(size, steps, body)


def ahead(coefficient: float, error: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    weight, bias = shares
    return coefficient * LR / (1 - 0.9) * torch.cat([weight * error[:2000], bias * error[2000:]])


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_the_gradient_is_taken_where_sgd_will_end_with_what_the_ranks_have_in_common(coefficient: float) -> None:
    for steps in run(3, TOPK, sgd, Anticipate(coefficient)):
        for before, after in pairwise(steps):
            error, _, shares = before.detail
            point = before.model - ahead(coefficient, error, shares)
            torch.testing.assert_close(after.detail[1], point, rtol=1e-9, atol=1e-12)
        assert steps[3].detail[0].any()
        assert 1 / 4 < float(shares[0]) < 1


def test_an_owner_counts_its_share_of_the_servers_error() -> None:
    for rank, steps in enumerate(run(4, SHARDED, sgd, Anticipate(1.0))):
        for before, after in pairwise(steps):
            error, _, shares = before.detail
            error[rank:2000:4] /= 4
            torch.testing.assert_close(after.detail[1], before.model - ahead(1.0, error, shares), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), [(0.0, 0, False), (0.9, 0, True), (0.8, 0.5, False)])
def test_the_response_is_how_far_sgd_moves_for_one_gradient(momentum: float, dampening: float, nesterov: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=momentum, dampening=dampening, nesterov=nesterov)
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for step in range(400):  # the first gradient, zero, sets the momentum up: SGD does not dampen that one
        parameter.grad = gradient.clone() if step == 1 else torch.zeros_like(gradient)
        optimizer.step()
    expected = gradient.clone()
    respond(optimizer, optimizer.param_groups[0], [parameter], [expected])
    torch.testing.assert_close(-parameter.detach(), expected)


def test_the_response_is_how_far_adam_moves_for_one_gradient_once_its_second_moment_has_settled() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.5, 0.99999))
    noise = torch.Generator().manual_seed(0)
    for _ in range(2000):
        parameter.grad = torch.randn(4, generator=noise, dtype=torch.float64)
        optimizer.step()
    for _ in range(60):
        parameter.grad = torch.zeros(4, dtype=torch.float64)
        optimizer.step()
    gradient = torch.tensor([3.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    expected, before = gradient.clone(), parameter.detach().clone()
    respond(optimizer, optimizer.param_groups[0], [parameter], [expected])
    for step in range(60):
        parameter.grad = gradient.clone() if step == 0 else torch.zeros_like(gradient)
        optimizer.step()
    torch.testing.assert_close(before - parameter.detach(), expected, rtol=0.03, atol=1e-9)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_with_nothing_unsent_it_is_ordinary_training(make: Make) -> None:
    everything = Compression.topk(schedule=lambda step: 1.0, **PLAIN)
    plain, ahead = run(2, everything, make, None), run(2, everything, make, Anticipate())
    for one, other in zip(plain[0], ahead[0], strict=True):
        assert torch.equal(one.model, other.model)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("compressor", [TOPK, SHARDED])
def test_all_ranks_keep_one_model_and_what_was_sent_and_kept_was_computed(compressor: Compressor, make: Make) -> None:
    seen = run(4, compressor, make, Anticipate())
    for steps in zip(*seen, strict=True):
        assert all(torch.equal(step.model, steps[0].model) for step in steps)
    assert any(step.detail[0].any() for step in seen[0])
    assert all(step.model.isfinite().all() for step in seen[0])


def test_anticipation_comes_closer_to_dense_training_than_error_feedback() -> None:
    """Far ratio, strong momentum: what is unsent is most of the way."""
    dense = run(4, Compression.topk(schedule=lambda step: 1.0, **PLAIN), sgd, None, 120)[0][-1].model
    far = Compression.topk(ratio=15.0, half=False, **PLAIN)
    feedback = (run(4, far, sgd, None, 120)[0][-1].model - dense).norm()
    ahead = (run(4, far, sgd, Anticipate(), 120)[0][-1].model - dense).norm()
    assert ahead < feedback / 2


@pytest.mark.parametrize("coefficient", [0.0, -1.0, 1.1])
def test_a_coefficient_out_of_range_is_refused(coefficient: float) -> None:
    with pytest.raises(ConfigurationError, match="Anticipate coefficient must be above 0"):
        Anticipate(coefficient)


@pytest.mark.parametrize("make", [torch.optim.RMSprop, lambda p: torch.optim.Adam(p, amsgrad=True)])
def test_an_optimizer_of_unknown_response_is_refused(make: Make) -> None:
    model = Model()
    with pytest.raises(ConfigurationError, match="SGD, Adam and AdamW"):
        hvd_sketch.DistributedOptimizer(
            make(model.parameters()), model.named_parameters(), TOPK, error_feedback=Anticipate()
        )


def test_saving_and_stepping_inside_the_block_are_refused() -> None:
    def on_rank(comm: Communicator) -> None:
        model = Model()
        optimizer: Any = hvd_sketch.DistributedOptimizer(
            sgd(model.parameters()), model.named_parameters(), TOPK, comm=comm, error_feedback=Anticipate()
        )
        with optimizer.step_ahead():
            with pytest.raises(RuntimeError, match="save outside"):
                optimizer.state_dict()
            with pytest.raises(RuntimeError, match="save outside"):
                optimizer.memory_state_dict()
            with pytest.raises(RuntimeError, match="end the block"):
                optimizer.step()
            loss(model, comm.rank, 0).backward()
        optimizer.step()

    run_in_process(2, on_rank)


def train_and_resume() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten steps in one go, and five, saved and resumed in a new optimizer, and five more."""
    hvd_sketch.init()
    whole, _ = _train(10, None)
    half, saved = _train(5, None)
    resumed, _ = _train(5, (half, saved))
    return training.flat(whole), training.flat(resumed)


def _train(steps: int, start: Any) -> tuple[torch.nn.Module, Any]:
    model = training.net()
    if start is not None:
        model.load_state_dict(start[0].state_dict())
    optimizer: Any = hvd_sketch.DistributedOptimizer(
        adamw(model.parameters()),
        model.named_parameters(),
        Compression.sharded(ratio=5.0, warmup_steps=0),
        error_feedback=Anticipate(second_moments=FactoredMoments()),
    )
    first = 0
    if start is not None:
        optimizer.load_state_dict(start[1][0])
        optimizer.load_memory_state_dict(start[1][1])
        first = start[1][2]
    for step in range(first, first + steps):
        optimizer.zero_grad()
        with optimizer.step_ahead():
            training.loss(model, hvd_sketch.rank(), step).backward()
        optimizer.step()
    return model, (optimizer.state_dict(), optimizer.memory_state_dict(), first + steps)


def test_real_ranks_agree_and_resume_to_the_bit() -> None:
    seen = ranks(2, train_and_resume)
    assert all(torch.equal(vector, seen[0][0]) for rank in seen for vector in rank)
