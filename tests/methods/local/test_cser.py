"""CSER: how the mean model moves, what all ranks share, its special cases, and its state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import hvd_sketch
from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.methods.local.cser import CSER
from hvd_sketch.methods.local.local_sgd import LocalSGD
from tests.support import training
from tests.support.heterogeneous import Model, Seen, loss, momenta, simulate
from tests.support.ranks import ranks

PLAIN: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None, "dense_below": 100}
TOPK, STRIDE = Compression.topk(ratio=10.0, half=False, **PLAIN), Compression.stride(ratio=10.0, **PLAIN)
STRONG = Compression.stride(ratio=20.0, seed=1, **PLAIN)
SHARDED = Compression.sharded(ratio=10.0, half=False, **PLAIN)
LR = 0.05


def run(size: int, steps: int, make: Callable[[Any, Model, Communicator], Any]) -> list[list[Seen]]:
    """The details of a step are the local momentum and, where there is one, the error after it."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        optimizer = make(torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), model, comm)

        def step(number: int) -> Any:
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()
            error = optimizer._errors.clone() if isinstance(optimizer, CSER) else None
            return momenta(optimizer, model), error

        return step

    return simulate(size, steps, body)


def cser(gradients: Any, errors: Any, period: int) -> Callable[[Any, Model, Communicator], CSER]:
    return lambda sgd, model, comm: CSER(sgd, model, comm, gradients=gradients, errors=errors, period=period)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("gradients", "errors", "period"),
    [(STRONG, STRIDE, 4), (TOPK, TOPK, 3), (SHARDED, STRIDE, 4), (None, STRIDE, 1), (None, TOPK, 4)],
    ids=["stride", "topk", "sharded", "csea", "partial"],
)
def test_the_mean_model_moves_by_the_mean_step_and_all_share_model_less_error(
    size: int, gradients: Any, errors: Any, period: int
) -> None:
    seen = run(size, 13, cser(gradients, errors, period))
    before = torch.zeros(2050).double()
    for steps in zip(*seen, strict=True):
        mean = torch.stack([step.model for step in steps]).mean(0)
        momentum = torch.stack([step.detail[0] for step in steps]).mean(0)
        torch.testing.assert_close(mean, before - LR * momentum, rtol=0, atol=1e-5)
        before = mean
        for step in steps:
            torch.testing.assert_close(
                step.model - step.detail[1], steps[0].model - steps[0].detail[1], rtol=0, atol=1e-5
            )
    assert all(steps[-2].detail[1].any() for steps in seen)


def test_sending_everything_is_sgd() -> None:
    """The gradient's mean and the momentum are linear: one rank with all ranks' losses takes the same steps."""
    size, steps = 3, 10
    seen = run(size, steps, cser(Compression.none, Compression.none, 4))
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for number in range(steps):
        sgd.zero_grad()
        for rank in range(size):
            (loss(model, rank, number) / size).backward()
        sgd.step()
        expected = torch.cat([model.weight.detach().reshape(-1), model.bias.detach()])
        for rank in range(size):
            torch.testing.assert_close(seen[rank][number].model, expected, rtol=0, atol=1e-5)


def test_sending_no_steps_and_all_errors_is_local_sgd() -> None:
    expected = run(3, 12, lambda sgd, model, comm: LocalSGD(sgd, model, comm, compression=Compression.none, period=4))
    found = run(3, 12, cser(None, Compression.none, 4))
    for one, other in zip(expected, found, strict=True):
        for before, after in zip(one, other, strict=True):
            torch.testing.assert_close(before.model, after.model, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradients": TOPK, "errors": TOPK, "period": 0},
        {"gradients": TOPK, "errors": None},
        {"gradients": Compression.fp16, "errors": TOPK},
        {"gradients": TOPK, "errors": Compression.topk(ratio=10.0, dense_below=5000)},
        {"gradients": Compression.topk(momentum=hvd_sketch.Momentum(0.9)), "errors": TOPK},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    model = training.net()
    with pytest.raises(ConfigurationError):
        CSER(torch.optim.SGD(model.parameters(), lr=LR), model, SingleProcess(), **settings)


def real() -> dict[str, torch.Tensor]:
    """On a real rank: train, resume in the middle, average, flush, and go on in one process."""
    import horovod.torch as hvd

    hvd.init()
    rank, told = hvd.rank(), {}

    def fresh(comm: Any = None) -> tuple[torch.nn.Module, Any]:
        model = training.net()
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        return model, CSER(sgd, model, comm, gradients=STRONG, errors=TOPK, period=3)

    model, optimizer = fresh()
    means, momentum = [training.flat(model).double()], []
    for number in range(8):
        if number == 4:
            saved = optimizer.memory_state_dict()
        training.train(optimizer, model, range(number, number + 1), rank)
        means.append(hvd.allreduce(training.flat(model).double(), op=hvd.Average, name="model"))
        buffers = torch.cat([optimizer.state[p]["momentum_buffer"].double().reshape(-1) for p in model.parameters()])
        momentum.append(LR * hvd.allreduce(buffers, op=hvd.Average, name="momentum"))
    told["moved"] = torch.stack([before - after for before, after in pairwise(means)])
    told["momentum"] = torch.stack(momentum)
    told["whole"] = training.flat(model)
    layout = optimizer.gradient_exchange.layout
    parameters = dict(model.named_parameters())
    shared = torch.cat([parameters[slot.name].detach().reshape(-1) for slot in layout.slots])
    told["shared"] = shared - optimizer._errors
    with optimizer.average_model():
        told["mean"] = training.flat(model)

    resumed, optimizer = fresh()
    optimizer.load_memory_state_dict(saved)
    told["resumed"] = training.train(optimizer, resumed, range(4, 8), rank)
    optimizer.flush()
    told["flushed"], told["flushed error"] = training.flat(resumed), optimizer._errors

    alone, optimizer = fresh(SingleProcess())
    alone.load_state_dict(resumed.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    told["before"] = training.loss(alone, rank, 8)
    training.train(optimizer, alone, range(8, 40), rank)
    told["after"] = training.loss(alone, rank, 8)
    return {name: value.detach().clone() for name, value in told.items()}


def test_real_ranks() -> None:
    """The invariants; resume to the bit; after a flush one model is all there is, for any number of ranks."""
    seen = ranks(2, real, timeout=240)
    for told in seen:
        torch.testing.assert_close(told["moved"], told["momentum"], rtol=0, atol=1e-6)
        torch.testing.assert_close(told["shared"], seen[0]["shared"], rtol=0, atol=1e-6)
        assert torch.equal(told["whole"], told["resumed"])
        assert torch.equal(told["flushed"], seen[0]["flushed"])
        torch.testing.assert_close(told["flushed"], told["mean"], rtol=0, atol=1e-7)
        assert not told["flushed error"].any()
        assert told["after"] < told["before"]
    assert not torch.equal(seen[0]["whole"], seen[1]["whole"])
