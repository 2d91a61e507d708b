"""Methods with a server on a single rank, which serves itself: what wrapping keeps, saving, and bad settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.methods.server import (
    AsyncSGD,
    LocalNoise,
    Plain,
    ServerLost,
    ZenoPlus,
    place,
)
from hvd_sketch.methods.server.client import Client
from hvd_sketch.methods.server.line import Line
from hvd_sketch.methods.server.message import Kind
from tests.methods.server.asynchronous import RATE, TOPK, async_sgd
from tests.methods.server.support import Vector
from tests.support.methods import train as follow
from tests.support.training import flat, loss, net

SPARSE = Compression.topk(ratio=8.0, warmup_steps=0, dense_below=100)
ALONE: dict[str, Any] = {"patience": 30.0}


def alone(**arguments: Any) -> AsyncSGD:
    from mpi4py import MPI

    return async_sgd(Vector(torch.zeros(3)), MPI.COMM_SELF, **{"server_works": True, **arguments})


def test_a_single_rank_serves_itself() -> None:
    changes: list[int] = []
    with alone(on_change=changes.append) as optimizer:
        for _ in range(4):
            optimizer.model.get_parameter("x").grad = torch.ones(3)
            optimizer.step(lambda: None)
        with optimizer.server_model() as model:
            assert torch.equal(model.get_parameter("x"), torch.full((3,), -4 * RATE))
            with pytest.raises(RuntimeError, match="inside server_model"):
                optimizer.step()
    assert changes == [1, 2, 3, 4]
    assert optimizer.stats.bytes_sent == 0
    assert torch.equal(optimizer.model.get_parameter("x"), torch.full((3,), -4 * RATE))
    with pytest.raises(RuntimeError, match="belong inside"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="is finished: make a new one"), optimizer:
        pass


def test_the_server_does_not_take_its_own_workers_model_away() -> None:
    def look(version: int) -> None:
        with optimizer.server_model():
            pass

    def step_twice() -> None:
        optimizer.step()
        optimizer.step()

    optimizer = alone(on_change=look)
    with pytest.raises(RuntimeError, match="serving ended by an error") as raised, optimizer:
        step_twice()
    assert "would change the model that this rank's worker trains" in str(raised.value.__cause__)


class Broken(Plain):
    def apply(self, model: Tensor, pushes: Any) -> list[bool]:
        raise ZeroDivisionError("its own")


def test_a_state_is_not_saved_in_the_middle_of_a_step() -> None:
    def save(version: int) -> None:
        optimizer.memory_state_dict()

    def step_twice() -> None:
        optimizer.step()
        optimizer.step()

    optimizer = alone(on_change=save)
    with pytest.raises(RuntimeError, match="serving ended by an error") as raised, optimizer:
        step_twice()
    assert "in the middle of a step of this rank's worker" in str(raised.value.__cause__)


def test_an_error_of_the_rule_is_the_workers_error() -> None:
    with pytest.raises(RuntimeError, match="serving ended by an error") as raised, alone(rule=Broken()) as optimizer:
        optimizer.step()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_learning_rate_schedule_and_a_scaler_work_as_always() -> None:
    with alone() as optimizer:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        parameter = optimizer.model.get_parameter("x")
        for _ in range(2):
            parameter.grad = torch.ones(3)
            optimizer.step()
            schedule.step()
    assert torch.equal(parameter.detach(), torch.full((3,), -1.5 * RATE))


def test_the_proximal_term_pulls_back_to_the_servers_model() -> None:
    """From 0 with gradient 1: z = -r, then z = -r - r (1 - p r)."""
    with alone(period=2, proximal=4.0) as optimizer:
        parameter = optimizer.model.get_parameter("x")
        for _ in range(2):
            parameter.grad = torch.ones(3)
            optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((3,), -RATE - RATE * (1 - 4.0 * RATE)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, "period must be at least 1 step"),
        ({"period": 2.5}, "period must be a whole number, got 2.5"),
        ({"server": 0.5}, "server must be a whole number, got 0.5"),
        ({"outgoing": LocalNoise(1.0, 1.0)}, "outgoing must be a list of functions of an update"),
        ({"outgoing": [0.5]}, "outgoing must be a list of functions"),
        ({"on_change": "save"}, "on_change must be a function of the version"),
        ({"log": 5}, "log must be the path of a file"),
        ({"samples": 1.5}, "samples must be a whole number"),
        ({"proximal": -1.0}, "proximal must be at least 0"),
        ({"memory": "all"}, "memory must be one of"),
        ({"patience": 0.0}, "patience must be a positive number"),
        ({"samples": 0}, "of a worker must be at least 1, rank 0 has 0"),
        ({"server": 1}, "server must be a rank below 1"),
        ({"server_works": False}, "cannot be a server without workers"),
        ({"up": Compression.sketch(ratio=2.0, dense_below=0)}, "Sketch cannot choose"),
        ({"up": Compression.fp16}, "up must be Compression.none, topk"),
        ({"up": TOPK, "down": Compression.topk(ratio=8.0)}, "nothing to compress|leave different parameters whole"),
        ({"comm": "world"}, "mpi4py intracommunicator"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    from mpi4py import MPI

    model = torch.nn.Linear(60, 50)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=message):
        AsyncSGD(sgd, model, **{"comm": MPI.COMM_SELF, "server_works": True, **arguments})


def test_importing_needs_no_mpi4py() -> None:
    program = "import sys, hvd_sketch.methods.server\nsys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=100).returncode == 0


METHODS: dict[str, Callable[[torch.optim.Optimizer, torch.nn.Module], Any]] = {
    "async": lambda sgd, model: AsyncSGD(sgd, model, server_works=True, **ALONE),
    "async, top-k": lambda sgd, model: AsyncSGD(
        sgd, model, server_works=True, period=3, up=SPARSE, down=SPARSE, **ALONE
    ),
    "async, Zeno++": lambda sgd, model: AsyncSGD(sgd, model, server_works=True, rule=ZenoPlus(trusted), **ALONE),
}
EVERY = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
STEPS, SAVED_AFTER = 13, 7


def trusted(model: torch.nn.Module, number: int) -> Tensor:
    return loss(model, 0, number)


def fresh(make: Callable[..., Any]) -> tuple[torch.nn.Module, Any]:
    model = net()
    return model, make(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), model)


@EVERY
def test_it_is_an_instance_of_the_users_class_and_shares_its_groups(make: Callable[..., Any]) -> None:
    _, optimizer = fresh(make)
    assert issubclass(type(optimizer), torch.optim.SGD)
    assert type(optimizer).__name__ == "SGD"
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    optimizer._engine.leave()


@EVERY
def test_a_saved_run_continues_as_if_never_saved(make: Callable[..., Any], tmp_path: Path) -> None:
    """The block ends where it is saved; one that goes on has a push less, so both begin a second block."""
    model, optimizer = fresh(make)
    with optimizer:
        follow(optimizer, model, 0, range(SAVED_AFTER))
    torch.save(optimizer.memory_state_dict(), tmp_path / "saved")
    ends = []
    for _ in range(2):
        other, resumed = fresh(make)
        resumed.load_memory_state_dict(torch.load(tmp_path / "saved", weights_only=True))
        with resumed:
            follow(resumed, other, 0, range(SAVED_AFTER, STEPS))
        ends.append(flat(other))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], flat(model))


def test_sending_everything_is_dense_training() -> None:
    ends = []
    for make in (METHODS["async"], lambda sgd, model: nullcontext(sgd)):
        model, optimizer = fresh(make)
        with optimizer as entered:
            follow(entered, model, 0, range(STEPS))
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_bad_gradient_spoils_no_model(make: Callable[..., Any]) -> None:
    model, optimizer = fresh(make)
    with optimizer:
        follow(optimizer, model, 0, range(STEPS), lambda step: step == 4)
    assert flat(model).isfinite().all()
    assert optimizer.stats.skipped == 1


def test_what_is_loaded_before_the_block_is_served() -> None:
    model, optimizer = fresh(METHODS["async"])
    weights = {name: torch.full_like(value, 7.0) for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    with optimizer, optimizer.server_model():
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_state_loaded_before_the_block_is_served_whatever_the_model_held() -> None:
    model, optimizer = fresh(METHODS["async"])
    with optimizer:
        follow(optimizer, model, 0, range(3))
    other, resumed = fresh(METHODS["async"])
    resumed.load_memory_state_dict(optimizer.memory_state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    with resumed, resumed.server_model():
        assert torch.equal(flat(other), flat(model))


def test_a_state_saved_while_looking_is_the_worker_s_own() -> None:
    model, optimizer = fresh(METHODS["async, top-k"])
    with optimizer:
        follow(optimizer, model, 0, range(5))  # two of them since the last push
        before = optimizer.memory_state_dict()["errors"]
        with optimizer.server_model():
            assert torch.equal(optimizer.memory_state_dict()["errors"], before)
            assert not torch.equal(optimizer._work.state_dict()["errors"], before)


def test_the_last_word_of_a_server_is_heard_whatever_else_has_come() -> None:
    from mpi4py import MPI

    line = Line(place(MPI.COMM_SELF), nbytes=8, patience=5.0, server=0)
    client = Client(line, 5.0, lambda: None)
    line.tell(0, Kind.END)
    line.tell(0, Kind.MODEL)
    with pytest.raises(ServerLost, match="the server has ended"):
        client.pull()


def test_a_loaded_optimizer_begins_anew_at_the_present_model() -> None:
    """As `load_state_dict` of every method does: a model that was loaded before is what is served."""
    model, optimizer = fresh(METHODS["async"])
    with torch.no_grad():
        model[0].bias.fill_(7.0)  # type: ignore[index]
    optimizer.load_state_dict(optimizer.state_dict())
    with optimizer, optimizer.server_model():
        assert (model[0].bias == 7.0).all()  # type: ignore[index]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.update(method="FedAT"), "method is 'FedAT', here 'AsyncSGD'"),
        (lambda state: state.pop("errors"), "the state has no 'errors'"),
        (lambda state: state["server"].update(model=torch.zeros(3)), r"server.model is a tensor float32\[3\]"),
        (lambda state: state["server"]["model"].fill_(torch.nan), "server.model has values that are not finite"),
        (lambda state: state["server"]["rule"].pop("arrivals"), "server.rule has no 'arrivals'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(spoil: Callable[[Any], Any], message: str) -> None:
    _, optimizer = fresh(METHODS["async, Zeno++"])
    state, before = optimizer.memory_state_dict(), optimizer._engine.store.model.clone()
    optimizer._engine.store.model.add_(1.0)
    changed = optimizer._engine.store.model.clone()
    spoil(state)
    with pytest.raises(ConfigurationError, match=message):
        optimizer.load_memory_state_dict(state)
    assert torch.equal(optimizer._engine.store.model, changed)
    assert not torch.equal(changed, before)
    optimizer._engine.leave()
