"""Local SGD with compressed meetings: how the model moves, its special cases, and its state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import hvd_sketch
from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.error_feedback.step_ahead import StepAhead
from hvd_sketch.methods.local.local_sgd import LocalSGD
from tests.support import training
from tests.support.heterogeneous import Model, Seen, loss, momenta, simulate
from tests.support.ranks import in_turn, ranks, several

PLAIN: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None, "dense_below": 100}
TOPK, SHARDED = Compression.topk(ratio=10.0, half=False, **PLAIN), Compression.sharded(ratio=10.0, half=False, **PLAIN)
LR = 0.05
VECTOR = ("weight", "bias")


def run(size: int, steps: int = 12, momentum: float = 0.9, **settings: Any) -> list[list[Seen]]:
    """The details of a step are the error after it and the local momentum."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
        optimizer = LocalSGD(sgd, model, comm, **settings)

        def step(number: int) -> Any:
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()
            held = momenta(optimizer, model) if optimizer.state else torch.zeros(2050)
            return optimizer.exchange.memory.residual.double().clone(), held

        return step

    return simulate(size, steps, body)


@pytest.mark.parametrize("compressor", [TOPK, SHARDED, Compression.none], ids=["topk", "sharded", "none"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("period", [1, 4])
def test_the_model_less_the_errors_moves_by_the_mean_of_the_local_moves(
    compressor: Any, size: int, period: int
) -> None:
    """Local SGD's ``x - z_i`` is the learning rate times the sum of the momenta of the local steps."""
    seen = run(size, compression=compressor, period=period)
    before, moved = torch.zeros_like(seen[0][0].model), torch.zeros_like(seen[0][0].model)
    for number, steps in enumerate(zip(*seen, strict=True), start=1):
        moved += LR * torch.stack([step.detail[1] for step in steps]).mean(0)
        alike = all(torch.equal(step.model, steps[0].model) for step in steps)
        assert alike == (size == 1 or number % period == 0)
        if number % period == 0:
            after = steps[0].model - torch.stack([step.detail[0] for step in steps]).mean(0)
            torch.testing.assert_close(after, before - moved, rtol=0, atol=1e-5)
            before, moved = after, torch.zeros_like(moved)
    assert bool(seen[0][-1].detail[0].any()) == (compressor is not Compression.none)


@pytest.mark.parametrize("compressor", [TOPK, SHARDED], ids=["topk", "sharded"])
def test_ranks_that_anticipate_begin_where_their_errors_will_have_taken_the_model(compressor: Any) -> None:
    """And x less the errors moves by the mean of the local moves, as without: the lead is not sent."""
    size, rate = 4, 0.7

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        optimizer = LocalSGD(sgd, model, comm, compression=compressor, period=3, outer_rate=rate, anticipate=0.5)

        def step(number: int) -> Any:
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()
            exchange = optimizer.exchange
            errors, its_share = exchange.memory.residual.double().clone(), exchange.memory.residual.double().clone()
            its_share[exchange.owned] /= size
            anchor, shares = optimizer._anchor.vector.clone(), optimizer._shares.shares
            return errors, its_share, anchor, shares, momenta(optimizer, model)

        return step

    seen = simulate(size, 12, body)
    before, moved = torch.zeros(2050, dtype=torch.float64), torch.zeros(2050, dtype=torch.float64)
    for number, steps in enumerate(zip(*seen, strict=True), start=1):
        moved += LR * torch.stack([step.detail[4] for step in steps]).mean(0)
        if number % 3:
            continue
        x, shares = steps[0].detail[2:4]
        for step in steps:
            its_share = step.detail[1]
            assert torch.equal(step.detail[2], x)
            lead = rate * 0.5 * torch.cat([shares[0] * its_share[:2000], shares[1] * its_share[2000:]])
            torch.testing.assert_close(step.model, x - lead, rtol=1e-5, atol=1e-7)
            assert lead.any()
        after = x - rate * torch.stack([step.detail[0] for step in steps]).mean(0)
        torch.testing.assert_close(after, before - rate * moved, rtol=0, atol=1e-5)
        before, moved = after, torch.zeros_like(moved)


def test_one_local_step_is_error_feedback() -> None:
    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        optimizer = hvd_sketch.DistributedOptimizer(
            sgd, model.named_parameters(), TOPK, comm=comm, error_feedback=StepAhead(0.0, 0)
        )

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()

        return step

    expected, found = simulate(3, 10, body), run(3, 10, compression=TOPK, period=1)
    for one, other in zip(expected[0], found[0], strict=True):
        assert torch.equal(one.model, other.model)


def test_outer_optimizers_by_their_formulas() -> None:
    """Against two lines of arithmetic on the mean models of a run without outer momentum, one meeting long."""
    first = run(2, 4, compression=Compression.none, period=4)[0][-1].model
    plain = run(2, 4, compression=Compression.none, period=4, outer_rate=0.7)[0][-1].model
    heavy = run(2, 4, compression=Compression.none, period=4, outer_momentum=0.5, nesterov=False)[0][-1].model
    nesterov = run(2, 4, compression=Compression.none, period=4, outer_momentum=0.5)[0][-1].model
    torch.testing.assert_close(plain, 0.7 * first, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(heavy, first, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(nesterov, 1.5 * first, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("compressor", [TOPK, SHARDED, Compression.none], ids=["topk", "sharded", "none"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy ball", "nesterov"])
@pytest.mark.parametrize("sync", ["keep", "reset", "average"])
def test_the_outer_momentum_takes_what_is_exchanged_as_its_gradient(
    compressor: Any, nesterov: bool, sync: Any
) -> None:
    """Against PyTorch's own SGD on the updates of four meetings, whatever is done with the local momentum."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        optimizer = LocalSGD(
            sgd,
            model,
            comm,
            compression=compressor,
            period=3,
            momentum_sync=sync,
            outer_rate=0.7,
            outer_momentum=0.5,
            nesterov=nesterov,
        )

        def step(number: int) -> Any:
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()
            updates = [optimizer.exchange.update_of(optimizer.exchange.layout.index()[name]) for name in VECTOR]
            return torch.cat([update.double().reshape(-1) for update in updates])

        return step

    for steps in simulate(3, 12, body):
        point = torch.zeros(2050, dtype=torch.float64, requires_grad=True)
        outer = torch.optim.SGD([point], lr=0.7, momentum=0.5, nesterov=nesterov)
        for step in steps[2::3]:
            point.grad = step.detail
            outer.step()
            torch.testing.assert_close(step.model, point.detach(), rtol=1e-9, atol=1e-12)


RATES = [0.05, 0.05, 0.02, 0.0, 0.1]


def test_slow_momentum_follows_the_published_recursion_while_the_learning_rate_changes() -> None:
    """SlowMo, equations (2) and (3): ``u <- b u + (x - mean z) / lr``, ``x <- x - r lr u``; two groups, two rates."""
    period, rate, factor = 3, 0.7, 0.5

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        groups = [{"params": [parameter]} for parameter in model.parameters()]
        sgd = torch.optim.SGD(groups, lr=0.1)
        options: dict[str, Any] = {"outer_rate": rate, "outer_momentum": factor, "nesterov": False}
        optimizer = LocalSGD(sgd, model, comm, compression=Compression.none, period=period, **options)

        def step(number: int) -> Any:
            for scale, group in zip((1.0, 0.5), optimizer.param_groups, strict=True):
                group["lr"] = scale * RATES[number // period]
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()
            updates = [optimizer.exchange.update_of(optimizer.exchange.layout.index()[name]) for name in VECTOR]
            return torch.cat([update.double().reshape(-1) for update in updates])

        return step

    scales = torch.cat([torch.full((count,), scale, dtype=torch.float64) for count, scale in ((2000, 1.0), (50, 0.5))])
    for steps in simulate(2, period * len(RATES), body):
        slow, point = torch.zeros_like(scales), torch.zeros_like(scales)
        for number, learning_rate in enumerate(RATES):
            seen = steps[period * (number + 1) - 1]
            rates = scales * learning_rate
            slow = factor * slow + (seen.detail / rates if learning_rate else 0.0)
            point = point - rate * rates * slow
            torch.testing.assert_close(seen.model, point, rtol=1e-9, atol=1e-12)
        assert point.count_nonzero() > 2000


@pytest.mark.parametrize("sync", ["keep", "reset", "average"])
def test_the_local_momentum_is_kept_reset_or_averaged(sync: Any) -> None:
    seen = run(3, 8, compression=TOPK, period=4, momentum_sync=sync)
    held = [steps[3].detail[1] for steps in seen]
    unchanged = [steps[3].detail[1] for steps in run(3, 4, compression=TOPK, period=4)]
    if sync == "keep":
        assert all(torch.equal(*pair) for pair in zip(held, unchanged, strict=True))
    elif sync == "reset":
        assert not torch.stack(held).any()
    else:
        mean = torch.stack(unchanged).mean(0)
        for one in held:
            torch.testing.assert_close(one, mean, rtol=1e-12, atol=1e-15)


def test_any_inner_optimizer() -> None:
    def body(comm: Communicator, model: Model) -> Callable[[int], float]:
        adam = torch.optim.AdamW(model.parameters(), lr=0.05)
        optimizer = LocalSGD(adam, model, comm, compression=SHARDED, period=3, momentum_sync="average")

        def step(number: int) -> float:
            optimizer.zero_grad()
            value = loss(model, comm.rank, number)
            value.backward()
            optimizer.step()
            return float(value.detach())

        return step

    for steps in simulate(3, 90, body):
        assert steps[-1].detail < 0.7 * steps[0].detail


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_is_left_out_on_its_rank_alone(scaled: bool) -> None:
    """With a gradient scaler as well, which must not keep that rank from the meeting."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=LR), model, comm, compression=TOPK, period=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)

        def step(number: int) -> tuple[int, float]:
            optimizer.zero_grad()
            value = loss(model, comm.rank, number) * (float("inf") if (number, comm.rank) == (2, 1) else 1.0)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            return optimizer.stats.skipped, scaler.get_scale()

        return step

    seen = simulate(2, 6, body)
    assert [steps[-1].detail[0] for steps in seen] == [0, 1]
    assert torch.equal(seen[0][-1].model, seen[1][-1].model)
    assert seen[0][-1].model.isfinite().all()
    if scaled:
        assert [steps[-1].detail[1] for steps in seen] == [2.0**10, 2.0**9]


@pytest.mark.parametrize(
    "settings",
    [
        {"period": 0},
        {"momentum_sync": "forget"},
        {"outer_rate": 0.0},
        {"outer_momentum": 1.0},
        {"outer_rate": float("inf")},
        {"anticipate": 1.5, "compression": TOPK},
        {"anticipate": 0.5},  # of nothing
        {"compression": Compression.fp16},
        {"compression": Compression.topk(momentum=hvd_sketch.Momentum(0.9))},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    model = training.net()
    with pytest.raises(ConfigurationError):
        LocalSGD(torch.optim.SGD(model.parameters(), lr=LR), model, SingleProcess(), **settings)


def real(compression: Any) -> dict[str, torch.Tensor]:
    """On a real rank: train, resume in the middle of a round, flush, and go on in one process."""
    import horovod.torch as hvd

    hvd.init()
    rank, told = hvd.rank(), {}

    def fresh(comm: Any = None) -> tuple[torch.nn.Module, Any]:
        model = training.net()
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        return model, LocalSGD(sgd, model, comm, compression=compression, period=3, outer_momentum=0.3)

    model, optimizer = fresh()
    training.train(optimizer, model, range(7), rank)
    saved = optimizer.memory_state_dict()
    training.train(optimizer, model, range(7, 12), rank)
    told["whole"], told["error"] = training.flat(model), optimizer.exchange.memory.residual
    told["dense bytes"] = torch.tensor(optimizer.stats.dense_bytes)
    told["bytes"] = torch.tensor(optimizer.stats.bytes_sent)

    resumed, optimizer = fresh()
    optimizer.load_memory_state_dict(saved)
    told["resumed"] = training.train(optimizer, resumed, range(7, 12), rank)
    told["resumed error"] = optimizer.exchange.memory.residual.clone()
    training.train(optimizer, resumed, range(12, 14), rank)
    mean_error = hvd.allreduce(optimizer.exchange.memory.residual.double(), op=hvd.Average, name="error")
    parts = {slot.name: mean_error[slot.offset : slot.stop] for slot in optimizer.exchange.layout.slots}
    mean = hvd.allreduce(training.flat(resumed).double(), op=hvd.Average, name="model")
    told["expected"] = mean - torch.cat([parts[name] for name, _ in resumed.named_parameters()])
    optimizer.flush()
    told["flushed"], told["flushed error"] = training.flat(resumed), optimizer.exchange.memory.residual

    alone, optimizer = fresh(SingleProcess())
    alone.load_state_dict(resumed.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    told["before"] = training.loss(alone, rank, 14)
    training.train(optimizer, alone, range(14, 40), rank)
    told["after"] = training.loss(alone, rank, 14)
    return {name: value.detach().clone() for name, value in told.items()}


@pytest.mark.parametrize("number", [0, 1], ids=["topk", "sharded"])
def test_real_ranks(number: int, on_two_ranks: list[Any]) -> None:
    """Resume to the bit in the middle of a round; after a flush one model is all there is, for any number of ranks."""
    seen = [told[number] for told in on_two_ranks[0]]
    for told in seen:
        assert torch.equal(told["whole"], seen[0]["whole"])
        assert torch.equal(told["whole"], told["resumed"])
        assert torch.equal(told["error"], told["resumed error"])
        assert told["error"].any()
        torch.testing.assert_close(told["flushed"].double(), told["expected"], rtol=1e-6, atol=1e-7)
        assert torch.equal(told["flushed"], seen[0]["flushed"])
        assert not told["flushed error"].any()
        assert told["after"] < told["before"]
        assert told["bytes"] < told["dense bytes"] / 20


def rounds(compression: Any, period: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """On a real rank: of each meeting the move of ``x - mean e_i``, the mean of ``x - z_i``, and the model."""
    import horovod.torch as hvd

    hvd.init()
    model = training.net()
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    optimizer = LocalSGD(sgd, model, compression=compression, period=period)

    def mean(vector: torch.Tensor) -> torch.Tensor:
        averaged: torch.Tensor = hvd.allreduce(vector.double(), op=hvd.Average, name="mean")
        return averaged

    moved, walked, models = [], [], []
    for number in range(4):
        before = optimizer.memory_state_dict()
        training.train(optimizer, model, range(period * number, period * (number + 1)), hvd.rank())
        after = optimizer.memory_state_dict()
        errors = [mean(state["exchange"]["memory"]["residual"]) for state in (before, after)]
        moved.append((before["model"] - errors[0]) - (after["model"] - errors[1]))
        # what was handed in and not kept is how far this rank went
        walked.append(mean(optimizer.exchange.gradient))
        models.append(after["model"])
    return torch.stack(moved), torch.stack(walked), models


@pytest.fixture(scope="module")
def on_two_ranks() -> list[Any]:
    """What the ranks have to tell: of `real`, and of `rounds`."""
    trained = partial(several, real, [(TOPK,), (SHARDED,)])
    moved = partial(several, rounds, [(TOPK, 3), (SHARDED, 3), (Compression.none, 3)])
    return list(zip(*ranks(2, in_turn, [trained, moved], timeout=240), strict=True))


def test_real_ranks_move_by_the_mean_of_their_local_moves(on_two_ranks: list[Any]) -> None:
    seen = on_two_ranks[1]
    for told in seen:
        for (moved, walked, models), (_, _, those_of_rank_0) in zip(told, seen[0], strict=True):
            torch.testing.assert_close(moved, walked, rtol=0, atol=1e-6)
            assert walked.any()
            assert all(map(torch.equal, models, those_of_rank_0))
