"""Overlap Local-SGD: its formulas, that the exchange is one round behind, and its state."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_sketch import ConfigurationError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.base import Pending
from hvd_sketch.methods.local.local_sgd import LocalSGD
from hvd_sketch.methods.local.overlap import OverlapLocalSGD
from tests.support import training
from tests.support.heterogeneous import Model, loss, simulate
from tests.support.ranks import in_turn, ranks

LR = 0.05


def run(size: int, steps: int, make: Callable[[Any, Model, Communicator], Any]) -> list[torch.Tensor]:
    """The models after every step, one tensor (steps, total) a rank."""

    def body(comm: Communicator, model: Model) -> Callable[[int], None]:
        optimizer = make(torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), model, comm)

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss(model, comm.rank, number).backward()
            optimizer.step()

        return step

    return [torch.stack([step.model for step in steps]) for steps in simulate(size, steps, body)]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("pull", "momentum"), [(0.6, 0.0), (0.6, 0.7), (1.0, 0.0), (0.2, 0.9)])
def test_it_does_what_the_formulas_say(size: int, pull: float, momentum: float) -> None:
    """Against the same formulas over all ranks at once, in one process."""
    period, steps = 3, 12
    found = run(
        size,
        steps,
        lambda sgd, model, comm: OverlapLocalSGD(sgd, model, comm, period=period, pull=pull, anchor_momentum=momentum),
    )
    models = [Model() for _ in range(size)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9) for model in models]
    anchor, velocities = torch.zeros(2050).double(), [torch.zeros(2050).double() for _ in range(size)]
    for number in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss(model, rank, number).backward()
            optimizer.step()
        if number % period == period - 1:
            arrived, sums = anchor, torch.zeros(2050).double()
            for rank, model in enumerate(models):
                local = torch.cat([model.weight.detach().reshape(-1), model.bias.detach()])
                local = (1 - pull) * local + pull * arrived
                velocities[rank] = momentum * velocities[rank] - (local - arrived)
                sums += (arrived - velocities[rank]) / size
                model.weight.data.copy_(local[:2000].view(50, 40))
                model.bias.data.copy_(local[2000:])
            anchor = sums
        for rank, model in enumerate(models):
            expected = torch.cat([model.weight.detach().reshape(-1), model.bias.detach()])
            torch.testing.assert_close(found[rank][number], expected, rtol=1e-9, atol=1e-12)


def test_it_comes_as_near_as_local_sgd() -> None:
    """The mean of the models after 300 steps at a constant rate, against the optimum."""
    optimum = run(4, 300, lambda sgd, model, comm: LocalSGD(sgd, model, comm, period=1))[0][-50:].mean(0)
    overlapped = run(4, 300, lambda sgd, model, comm: OverlapLocalSGD(sgd, model, comm, period=4, anchor_momentum=0.0))
    mean = torch.stack([models[-50:].mean(0) for models in overlapped]).mean(0)
    assert float((mean - optimum).norm()) < 0.05 * float(optimum.norm())


class Late(Pending):
    """Notes when it was started, asked and waited for."""

    def __init__(self, log: list[str], tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self.log = log
        log.append("start")

    def poll(self) -> None:
        self.log.append("poll")

    def wait(self) -> torch.Tensor:
        self.log.append("wait")
        return super().wait()


class Alone(SingleProcess):
    def __init__(self) -> None:
        self.log: list[str] = []

    def post_allreduce(self, tensor: torch.Tensor, name: str) -> Pending:
        return Late(self.log, tensor)


def test_the_exchange_runs_during_the_next_round() -> None:
    model, comm = training.net(), Alone()
    optimizer = OverlapLocalSGD(torch.optim.SGD(model.parameters(), lr=LR), model, comm, period=2)
    comm.log.clear()  # the ranks have compared their settings
    training.train(optimizer, model, 6)
    round_of_two = ["poll", "poll", "wait", "start"]
    assert comm.log == ["start", *round_of_two, *round_of_two]


@pytest.mark.parametrize("settings", [{"period": 0}, {"pull": 0.0}, {"pull": 1.1}, {"anchor_momentum": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    model = training.net()
    with pytest.raises(ConfigurationError):
        OverlapLocalSGD(torch.optim.SGD(model.parameters(), lr=LR), model, SingleProcess(), **settings)


def communicator(backend: str) -> Any:
    if backend == "mpi":
        from mpi4py import MPI

        return MPI.COMM_WORLD
    import horovod.torch as hvd

    hvd.init()
    return None


def with_and_without_a_late_rank(backend: str, folder: Path) -> list[torch.Tensor]:
    """On a real rank: train twice. In the second run rank 0 meets only when rank 1 has computed the next round."""
    comm, ends = communicator(backend), []
    for is_late in (False, True):
        model = training.net()
        optimizer = OverlapLocalSGD(torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), model, comm, period=3)
        rank, ahead = optimizer._collectives.rank, folder / "rank 1 has computed the next round"

        def after_backward(step: int, is_late: bool = is_late, rank: int = rank, ahead: Path = ahead) -> None:
            if is_late and (rank, step) == (1, 5):
                ahead.touch()
            while is_late and (rank, step) == (0, 2) and not ahead.exists():
                time.sleep(0.01)

        ends.append(training.train(optimizer, model, range(10), rank, after_backward))
        optimizer.flush()
    return ends


def pulled_and_anchor(backend: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """On a real rank: of each meeting the anchor before it, this rank's model, and the anchor that comes of it."""
    comm, seen = communicator(backend), []
    model = training.net()
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    optimizer = OverlapLocalSGD(sgd, model, comm, period=3, anchor_momentum=0.0)
    for number in range(4):
        before = optimizer.memory_state_dict()["anchor"]
        training.train(optimizer, model, range(3 * number, 3 * number + 3), optimizer._collectives.rank)
        after = optimizer.memory_state_dict()
        seen.append((before, after["model"], after["anchor"]))
    return seen


def real(backend: str) -> dict[str, torch.Tensor]:
    """On a real rank: train, resume while an exchange is under way, flush, and go on in one process."""
    comm, told = communicator(backend), {}

    def fresh(comm: Any) -> tuple[torch.nn.Module, Any]:
        model = training.net()
        return model, OverlapLocalSGD(torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), model, comm, period=3)

    model, optimizer = fresh(comm)
    rank = optimizer._collectives.rank
    training.train(optimizer, model, range(7), rank)
    saved = optimizer.memory_state_dict()
    told["whole"] = training.train(optimizer, model, range(7, 14), rank)
    with optimizer.average_model():
        told["mean"] = training.flat(model)
    optimizer.flush()
    told["flushed"] = training.flat(model)

    resumed, optimizer = fresh(comm)
    optimizer.load_memory_state_dict(saved)
    told["resumed"] = training.train(optimizer, resumed, range(7, 14), rank)
    optimizer.flush()

    alone, optimizer = fresh(SingleProcess())
    alone.load_state_dict(model.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    told["before"] = training.loss(alone, rank, 14)
    training.train(optimizer, alone, range(14, 40), rank)
    told["after"] = training.loss(alone, rank, 14)
    return {name: value.detach().clone() for name, value in told.items()}


@pytest.fixture(scope="module", params=["horovod", "mpi"])
def on_three_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of each body above, what the ranks have to tell."""
    folder, backend = tmp_path_factory.mktemp("ranks"), request.param
    late, meetings = partial(with_and_without_a_late_rank, backend, folder), partial(pulled_and_anchor, backend)
    return list(zip(*ranks(3, in_turn, [late, meetings, partial(real, backend)], timeout=240), strict=True))


def test_nobody_waits_for_a_late_rank_and_the_result_does_not_tell(on_three_ranks: list[Any]) -> None:
    """If a rank waited in the meeting that it begins, all would wait for each other."""
    for in_time, late in on_three_ranks[0]:
        assert torch.equal(in_time, late)


def test_without_momentum_the_anchor_is_the_mean_of_what_real_ranks_have(on_three_ranks: list[Any]) -> None:
    for meeting in zip(*on_three_ranks[1], strict=True):
        models = torch.stack([model for _, model, _ in meeting])
        assert not torch.equal(models[0], models[1])
        for before, _, anchor in meeting:
            torch.testing.assert_close(anchor, models.mean(0), rtol=0, atol=1e-6)
            assert torch.equal(before, meeting[0][0])
            assert torch.equal(anchor, meeting[0][2])


def test_real_ranks(on_three_ranks: list[Any]) -> None:
    """Resume to the bit; after a flush one model is all there is, for any number of ranks."""
    seen = on_three_ranks[2]
    for told in seen:
        assert torch.equal(told["whole"], told["resumed"])
        assert torch.equal(told["flushed"], seen[0]["flushed"])
        torch.testing.assert_close(told["flushed"], told["mean"], rtol=0, atol=1e-7)
        assert told["after"] < told["before"]
    assert not torch.equal(seen[0]["whole"], seen[1]["whole"])
