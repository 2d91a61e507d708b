"""Step-ahead error feedback: where gradients are taken, how the model moves, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import hvd_sketch
from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.step_ahead import StepAhead, StepAheadOptimizer
from tests.support import training
from tests.support.heterogeneous import Model, Seen, loss, momenta, simulate, vector
from tests.support.ranks import ranks, several

PLAIN: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None, "dense_below": 100}
TOPK, SHARDED = Compression.topk(ratio=10.0, half=False, **PLAIN), Compression.sharded(ratio=10.0, half=False, **PLAIN)
SKETCH = Compression.sketch(ratio=5.0, half=False, **PLAIN)
COMPRESSORS = pytest.mark.parametrize("compressor", [TOPK, SHARDED, SKETCH], ids=["topk", "sharded", "sketch"])
LR = 0.05


def wrapped(
    model: torch.nn.Module, comm: Any, compressor: Compressor, settings: StepAhead, momentum: float = 0.9
) -> Any:
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=1e-3)
    return hvd_sketch.DistributedOptimizer(
        sgd, model.named_parameters(), compressor, comm=comm, error_feedback=settings
    )


def run(size: int, compressor: Compressor, settings: StepAhead, steps: int = 14) -> list[list[Seen]]:
    """The details of a step are the error after it, the point of the gradient, and the momentum."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        optimizer = wrapped(model, comm, compressor, settings)

        def step(number: int) -> Any:
            optimizer.zero_grad()
            with optimizer.step_ahead():
                point = vector(model)
                loss(model, comm.rank, number).backward()
            optimizer.step()
            return optimizer.exchange.memory.residual.double().clone(), point, momenta(optimizer, model)

        return step

    return simulate(size, steps, body)


@COMPRESSORS
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("settings", [StepAhead(), StepAhead(0.4, 3), StepAhead(0.0), StepAhead(1.0, 1)], ids=str)
def test_the_model_less_the_errors_moves_by_the_mean_momentum(
    compressor: Compressor, size: int, settings: StepAhead
) -> None:
    """Also where errors are averaged, and where the way down is compressed: the owner's error holds the server's."""
    seen = run(size, compressor, settings)
    before = torch.zeros_like(seen[0][0].model)
    for steps in zip(*seen, strict=True):
        assert all(torch.equal(step.model, steps[0].model) for step in steps)
        after = steps[0].model - torch.stack([step.detail[0] for step in steps]).mean(0)
        momentum = torch.stack([step.detail[2] for step in steps]).mean(0)
        torch.testing.assert_close(after, before - LR * momentum, rtol=0, atol=1e-5)
        before = after
    if size > 1:
        assert any(step.detail[0].any() for step in seen[0])


@pytest.mark.parametrize("coefficient", [0.0, 0.4, 1.0])
def test_gradients_are_taken_where_the_error_is_applied(coefficient: float) -> None:
    for rank, steps in enumerate(run(3, TOPK, StepAhead(coefficient, 4))):
        for before, after in pairwise(steps):
            torch.testing.assert_close(
                after.detail[1], before.model - coefficient * before.detail[0], rtol=1e-12, atol=0
            )
        assert steps[2].detail[0].any(), rank


def test_an_owner_steps_ahead_by_its_share_of_the_servers_error() -> None:
    for rank, steps in enumerate(run(4, SHARDED, StepAhead(1.0, 0))):
        for before, after in pairwise(steps):
            error = before.detail[0].clone()
            error[rank:2000:4] /= 4
            torch.testing.assert_close(after.detail[1], before.model - error, rtol=1e-12, atol=1e-15)


def test_averaging_makes_all_errors_alike() -> None:
    seen = run(3, TOPK, StepAhead(1.0, 5), steps=10)
    for number, steps in enumerate(zip(*seen, strict=True), start=1):
        alike = all(torch.equal(step.detail[0], steps[0].detail[0]) for step in steps)
        assert alike == (number % 5 == 0)


def test_by_default_it_sends_what_the_compressor_sends() -> None:
    """Nothing is averaged: the ratio is the one that was asked for."""

    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        optimizer = wrapped(model, comm, SHARDED, StepAhead())

        def step(number: int) -> Any:
            optimizer.zero_grad()
            with optimizer.step_ahead():
                loss(model, comm.rank, number).backward()
            optimizer.step()
            return optimizer.exchange.stats.ratio

        return step

    seen = simulate(4, 60, body)
    assert seen[0][-1].detail >= 0.98 * SHARDED.ratio


def test_without_stepping_ahead_it_is_error_feedback() -> None:
    """Without momentum the learning rate may stand before or behind the memory: then it is the ordinary exchange."""
    size, steps = 3, 12

    def ordinary(comm: Communicator, model: Model) -> Callable[[int], Any]:
        sgd = torch.optim.SGD(model.parameters(), lr=LR)
        exchange = TOPK.exchange(TOPK.layout(model.named_parameters()), comm, average=True, device=torch.device("cpu"))

        def step(number: int) -> None:
            sgd.zero_grad()
            loss(model, comm.rank, number).backward()
            for position, slot in enumerate(exchange.layout.slots):
                gradient = dict(model.named_parameters())[slot.name].grad
                assert gradient is not None
                exchange.submit(position, gradient)
            exchange.run()
            for position, slot in enumerate(exchange.layout.slots):
                dict(model.named_parameters())[slot.name].grad = exchange.update_of(position).double()
            sgd.step()

        return step

    def stepped(comm: Communicator, model: Model) -> Callable[[int], Any]:
        sgd = torch.optim.SGD(model.parameters(), lr=LR)
        optimizer: Any = hvd_sketch.DistributedOptimizer(
            sgd, model.named_parameters(), TOPK, comm=comm, error_feedback=StepAhead(0.0, 0)
        )

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()

        return step

    expected, found = simulate(size, steps, ordinary), simulate(size, steps, stepped)
    for one, other in zip(expected[0], found[0], strict=True):
        torch.testing.assert_close(one.model, other.model, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_stepping_ahead_and_averaging_come_closer_to_the_optimum() -> None:
    """On quadratics that differ between ranks, at a constant learning rate: the auxiliary point's distance."""
    optimum = (run(4, Compression.topk(schedule=lambda step: 1.0, half=False, **PLAIN), StepAhead(0.0, 0), 400))[0][
        -1
    ].model
    distance = {}
    for settings in (StepAhead(0.0, 0), StepAhead(1.0, 0), StepAhead(1.0, 5)):
        seen = run(4, Compression.topk(ratio=15.0, half=False, **PLAIN), settings, 400)
        error = torch.stack([steps[-1].detail[0] for steps in seen]).mean(0)
        distance[settings] = float((seen[0][-1].model - error - optimum).norm())
    assert distance[StepAhead(1.0, 5)] < distance[StepAhead(0.0, 0)]
    assert distance[StepAhead(1.0, 0)] < distance[StepAhead(0.0, 0)]


def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank() -> None:
    def body(comm: Communicator, model: Model) -> Callable[[int], Any]:
        optimizer = wrapped(model, comm, TOPK, StepAhead(1.0, 0))

        def step(number: int) -> Any:
            optimizer.zero_grad()
            with optimizer.step_ahead():
                (loss(model, comm.rank, number) * (float("nan") if (number, comm.rank) == (3, 1) else 1.0)).backward()
            optimizer.step()
            return optimizer.exchange.memory.residual.clone(), optimizer.exchange.stats.skipped

        return step

    for steps in simulate(2, 6, body):
        assert torch.equal(steps[3].model, steps[2].model)
        assert torch.equal(steps[3].detail[0], steps[2].detail[0])
        assert [step.detail[1] for step in steps] == [0, 0, 0, 1, 1, 1]
        assert steps[5].model.isfinite().all()
        assert not torch.equal(steps[5].model, steps[3].model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": Compression.none}, "errors to step by"),
        ({"op": hvd_sketch.Sum}, "op=Average"),
        ({"momentum_correction": True}, "momentum correction"),
        ({"compression": Compression.topk(momentum=hvd_sketch.Momentum(0.9))}, "momentum correction"),
    ],
)
def test_what_does_not_go_with_it_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = training.net()
    settings = {"compression": TOPK, "error_feedback": StepAhead(), "comm": SingleProcess(), **arguments}
    with pytest.raises(ConfigurationError, match=message):
        hvd_sketch.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=LR), model.named_parameters(), **settings
        )


@pytest.mark.parametrize("settings", [(-0.1, 0), (1.1, 0), (float("nan"), 0), (1.0, -1)])
def test_settings_out_of_range_are_refused(settings: tuple[float, int]) -> None:
    with pytest.raises(ConfigurationError, match="StepAhead"):
        StepAhead(*settings)


def optimizer_of_one() -> tuple[torch.nn.Module, Any]:
    model = training.net()
    return model, wrapped(model, SingleProcess(), TOPK, StepAhead())


def _inside(optimizer: Any, model: torch.nn.Module, misuse: Callable[[], Any]) -> None:
    before = training.flat(model)
    with optimizer.step_ahead():
        training.loss(model, 0, 1).backward()
        assert not torch.equal(training.flat(model), before)
        misuse()


def test_evaluating_and_saving_ahead_are_refused_and_the_model_comes_back() -> None:
    model, optimizer = optimizer_of_one()
    for _ in range(2):
        with optimizer.step_ahead():
            training.loss(model, 0, 0).backward()
        optimizer.step()
    before = training.flat(model)
    for misuse in (
        lambda: model.state_dict(),
        lambda: optimizer.state_dict(),
        lambda: optimizer.memory_state_dict(),
        lambda: torch.no_grad()(training.loss)(model, 0, 0),
        lambda: torch.inference_mode()(training.loss)(model, 0, 0),
        lambda: optimizer.step(),
        lambda: optimizer.step_ahead().__enter__(),
    ):
        with pytest.raises(RuntimeError, match="step_ahead"):
            _inside(optimizer, model, misuse)
        assert torch.equal(training.flat(model), before)
    model.state_dict()
    with torch.no_grad():
        training.loss(model, 0, 0)


def test_there_is_nothing_to_synchronize_however_many_passes_a_step_has() -> None:
    optimizer = optimizer_of_one()[1]
    optimizer.set_backward_passes_per_step(2)
    with pytest.raises(ConfigurationError, match="clip_norm"):
        optimizer.synchronize()


def test_a_closure_is_evaluated_ahead() -> None:
    model, optimizer = optimizer_of_one()

    def closure() -> float:
        optimizer.zero_grad()
        value = training.loss(model, 0, 0)
        value.backward()
        return float(value.detach())

    losses = [optimizer.step(closure) for _ in range(20)]
    assert losses[-1] < losses[0]


INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, LR, momentum=0.9),
    "adam": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}


def overflow(kind: str, scaled: bool) -> tuple[list[tuple[Any, Any]], torch.Tensor]:
    """On a real rank: everything that there is before and after two steps that overflow on rank 1, and the end."""
    import horovod.torch as hvd

    hvd.init()
    model = training.net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    optimizer: Any = hvd_sketch.DistributedOptimizer(
        INNER[kind](model.parameters()),
        model.named_parameters(),
        TOPK,
        grad_scaler=scaler if scaled else None,
        error_feedback=StepAhead(1.0, 3),
    )

    def everything() -> Any:
        state = model.state_dict(), optimizer.state_dict(), optimizer.exchange.memory.state_dict()
        return copy.deepcopy(state)

    pairs = []
    for number in range(8):
        bad = number in (0, 4)
        before = everything()
        optimizer.zero_grad()
        with optimizer.step_ahead():
            value = training.loss(model, hvd.rank(), number) * (float("inf") if bad and hvd.rank() == 1 else 1.0)
            scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if bad:
            pairs.append((before, everything()))
    return pairs, training.flat(model)


def test_a_step_that_overflows_on_one_rank_leaves_every_ranks_state() -> None:
    """Also momentum and step counts, with a gradient scaler and without; its powers of two change no bit."""
    seen = ranks(2, several, overflow, [(kind, scaled) for kind in INNER for scaled in (False, True)])
    for number in range(0, 2 * len(INNER), 2):
        for pairs, end in (told[number + scaled] for told in seen for scaled in (0, 1)):
            for before, after in pairs:
                assert identical(before, after)
            assert pairs[1][0][1]["state"]
            assert torch.equal(end, seen[0][number][1])


def identical(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)


def train(optimizer: Any, model: torch.nn.Module, steps: range, rank: int) -> torch.Tensor:
    for step in steps:
        optimizer.zero_grad()
        with optimizer.step_ahead():
            training.loss(model, rank, step).backward()
        optimizer.step()
    return training.flat(model)


REAL = {
    "topk": Compression.topk(ratio=10.0, half=False, **PLAIN),
    "sharded": Compression.sharded(ratio=10.0, half=False, **PLAIN),
    "sketch": Compression.sketch(ratio=10.0, half=False, **PLAIN),
}


def auxiliary(optimizer: Any, model: torch.nn.Module, hvd: Any) -> torch.Tensor:
    """The model less the mean error of the ranks, in the order of `training.flat`."""
    residual = hvd.allreduce(optimizer.exchange.memory.residual.double(), op=hvd.Average, name="error")
    parts = {slot.name: residual[slot.offset : slot.stop] for slot in optimizer.exchange.layout.slots}
    return training.flat(model).double() - torch.cat([parts[name] for name, _ in model.named_parameters()])


def real(compression: str) -> dict[str, torch.Tensor]:
    """On a real rank: train, resume in the middle, flush, and go on in one process."""
    import horovod.torch as hvd

    hvd.init()
    rank, told = hvd.rank(), {}

    def fresh(comm: Any = None) -> tuple[torch.nn.Module, Any]:
        model = training.net()
        return model, wrapped(model, comm, REAL[compression], StepAhead(1.0, 3))

    model, optimizer = fresh()
    assert isinstance(optimizer, StepAheadOptimizer)
    before, distances, expected = training.flat(model).double(), [], []
    for step in range(8):
        train(optimizer, model, range(step, step + 1), rank)
        if step == 3:
            saved = {name: value.clone() for name, value in model.state_dict().items()}, optimizer.memory_state_dict()
        after = auxiliary(optimizer, model, hvd)
        momentum = torch.cat([optimizer.state[p]["momentum_buffer"].double().reshape(-1) for p in model.parameters()])
        distances.append(before - after)
        expected.append(LR * hvd.allreduce(momentum, op=hvd.Average, name="momentum"))
        before = after
    told["distances"], told["expected"] = torch.stack(distances), torch.stack(expected)
    told["whole"], told["error"] = training.flat(model), optimizer.exchange.memory.residual

    model, optimizer = fresh()
    model.load_state_dict(saved[0])
    optimizer.load_memory_state_dict(saved[1])
    told["resumed"] = train(optimizer, model, range(4, 8), rank)
    told["resumed error"] = optimizer.exchange.memory.residual.clone()

    optimizer.flush()
    told["flushed"] = train(optimizer, model, range(8, 9), rank)
    told["flushed error"] = optimizer.exchange.memory.residual
    told["flushed auxiliary"] = auxiliary(optimizer, model, hvd)
    alone, optimizer = fresh(SingleProcess())
    alone.load_state_dict(model.state_dict())
    told["alone"] = train(optimizer, alone, range(9, 40), rank)
    told["loss before"], told["loss after"] = training.loss(model, rank, 9), training.loss(alone, rank, 9)
    return {name: value.detach().clone() for name, value in told.items()}


@pytest.fixture(scope="module")
def real_ranks() -> dict[str, list[dict[str, torch.Tensor]]]:
    """What two ranks have to tell, by compressor."""
    seen = ranks(2, several, real, [(name,) for name in REAL], timeout=240)
    return {name: [told[number] for told in seen] for number, name in enumerate(REAL)}


@pytest.mark.parametrize("compression", list(REAL))
def test_real_ranks(compression: str, real_ranks: dict[str, list[dict[str, torch.Tensor]]]) -> None:
    """Move by the mean momentum; resume to the bit; after a flush the model alone serves any number of ranks."""
    seen = real_ranks[compression]
    for told in seen:
        torch.testing.assert_close(told["distances"], told["expected"], rtol=0, atol=1e-6)
        assert torch.equal(told["whole"], seen[0]["whole"])
        assert torch.equal(told["whole"], told["resumed"])
        assert torch.equal(told["error"], told["resumed error"])
        assert told["error"].any()
        assert not told["flushed error"].any()
        assert torch.equal(told["flushed"].double(), told["flushed auxiliary"])
        assert told["loss after"] < told["loss before"]
