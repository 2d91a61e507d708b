"""AsyncSGD on real ranks: nothing is lost, nobody waits, a real run is replayed to the bit, and what goes wrong."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError, RankMismatchError
from hvd_sketch.methods.server import (
    AsyncSGD,
    FedAsync,
    Plain,
    Polyline,
    Rule,
    ServerLost,
    ServerStats,
    TurnedAway,
    WorkersLost,
    replay,
)
from tests.methods.server.support import Vector
from tests.support.ranks import ranks

COUNT = 1000
RATE = 2.0**-6
WORKERS = (1, 2, 3)
SPARSE: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None, "dense_below": 0}
TOPK = Compression.topk(ratio=8.0, **SPARSE)
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "period 3": {"period": 3},
    "top-k": {"up": TOPK, "down": TOPK, "period": 2},
    "error feedback": {"up": TOPK, "memory": "feedback"},
    "four bits": {"up": Compression.sharded(ratio=8.0, **SPARSE), "down": Compression.stride(ratio=8.0, **SPARSE)},
    "polyline": {"up": Polyline(4), "down": Polyline(4)},
    "server works": {"server": 2, "server_works": True},
    "FedAsync": {"rule": FedAsync(alpha=0.5)},
}


def async_sgd(model: torch.nn.Module, comm: Any, rate: float = RATE, **arguments: Any) -> AsyncSGD:
    sgd = torch.optim.SGD(model.parameters(), lr=rate)
    return AsyncSGD(sgd, model, comm, **{"patience": 30.0, **arguments})


def gradient_of(rank: int, step: int) -> Tensor:
    """A few bits of mantissa, so that sums are exact."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(-8, 9, (COUNT,), generator=generator).float()


def train(optimizer: AsyncSGD, steps: int, rank: int) -> Tensor:
    """Some steps; the sum of all that they moved, as a gradient points."""
    moved = torch.zeros(COUNT)
    for step in optimizer.work(range(steps)):
        optimizer.model.get_parameter("x").grad = gradient_of(rank, step)
        optimizer.step()
        moved += RATE * gradient_of(rank, step)
    return moved


class Trained(NamedTuple):
    """What one rank has at the end of its block, and what it did."""

    model: Tensor
    held: Tensor
    errors: Tensor
    moved: Tensor
    stats: ServerStats
    works: bool


def run(comm: Any, arguments: dict[str, Any], log: str) -> Trained:
    model = Vector(torch.full((COUNT,), float(comm.rank)))
    with async_sgd(model, comm, log=log, **arguments) as optimizer:
        moved = train(optimizer, 20 + comm.rank, comm.rank)
    work = optimizer._work
    return Trained(model.x.detach(), work.held.vector, work.errors, moved, optimizer.stats, optimizer.is_worker)


def poison(comm: Any) -> tuple[int, bool]:
    """Two gradients of worker 2 are not numbers, and then its model is not finite."""
    model = Vector(torch.zeros(COUNT))
    with async_sgd(model, comm) as optimizer:
        for step in optimizer.work(range(10)):
            model.x.grad = torch.full((COUNT,), math.nan if comm.rank == 2 and step in (3, 4) else 1.0)
            if (comm.rank, step) == (2, 6):
                model.x.data.fill_(math.inf)
            optimizer.step()
    return optimizer.stats.skipped, bool(model.x.isfinite().all())


def look(comm: Any) -> tuple[list[float], list[float]]:
    """Worker 1 looks at the server's model after each of its steps, of which it pushes two at a time."""
    model, seen, own = Vector(torch.zeros(1)), [], []
    with async_sgd(model, comm, rate=1.0, period=2) as optimizer:
        for _ in optimizer.work(range(4) if comm.rank == 1 else range(0)):
            model.x.grad = torch.ones(1)
            optimizer.step()
            with optimizer.server_model():
                seen.append(float(model.x.detach()))
            own.append(float(model.x.detach()))
    return seen, own


def misbehave(comm: Any) -> str:
    """Worker 3 sends a push of a wrong length, and is told; the others finish."""
    model = Vector(torch.zeros(COUNT))
    try:
        with warnings.catch_warnings(record=True) as caught, async_sgd(model, comm) as optimizer:
            warnings.simplefilter("always")
            for step in optimizer.work(range(12)):
                if (comm.rank, step) == (3, 4):
                    optimizer._engine.client.push(optimizer._version, 0, torch.zeros(9, dtype=torch.uint8))
                model.x.grad = torch.ones(COUNT)
                optimizer.step()
    except TurnedAway as error:
        return str(error)
    return f"{optimizer.stats.pushes} pushes {''.join(str(warning.message) for warning in caught)}"


class Resumed(NamedTuple):
    model: Tensor
    moved: Tensor
    unsent: Tensor
    version: int


def resume(comm: Any) -> Resumed:
    """All save in the middle of a period, and begin anew; worker 3 without what it saved."""
    model = Vector(torch.zeros(COUNT))
    with async_sgd(model, comm, up=TOPK, period=4) as optimizer:
        moved = train(optimizer, 10, comm.rank)
        state = optimizer.memory_state_dict()
        optimizer._steps_since = 0  # as if the process had ended here, with two steps under way
    if not optimizer.is_worker:
        state = optimizer.memory_state_dict()
    model = Vector(torch.full((COUNT,), -5.0))
    again = async_sgd(model, comm, up=TOPK, period=4)
    if comm.rank != 3:
        again.load_memory_state_dict(state)
    version = state["server"]["version"] if comm.rank == 0 else 0
    with again:
        for _ in again.work(range(1)):
            again.flush()
    return Resumed(model.x.detach(), moved, state["errors"], version)


def straggle(comm: Any) -> int:
    """Worker 1 takes its second step only when the others have taken all theirs."""
    model, deadline = Vector(torch.zeros(COUNT)), time.monotonic() + 60.0
    with async_sgd(model, comm) as optimizer:
        for step in optimizer.work(range(2 if comm.rank == 1 else 20)):
            while (comm.rank, step) == (1, 1):
                assert time.monotonic() < deadline, "the others waited for the slow worker"
                with optimizer.server_model():
                    if float(model.x.detach()[0]) == -RATE * (1 + 2 * 20):
                        break
                time.sleep(0.01)
            model.x.grad = torch.ones(COUNT)
            optimizer.step()
    return optimizer.stats.pushes


def flood(comm: Any) -> str:
    """Worker 3 sends a message larger than any may be."""
    model = Vector(torch.zeros(10))
    try:
        with async_sgd(model, comm) as optimizer:
            for _ in optimizer.work(range(5)):
                if comm.rank == 3:
                    optimizer._engine.client.push(0, 0, torch.zeros(10**6, dtype=torch.uint8))
                model.x.grad = torch.ones(10)
                optimizer.step()
    except TurnedAway as error:
        return str(error)
    return f"{optimizer.stats.pushes} pushes"


def end_by_errors(comm: Any, ranks: Container[int]) -> str:
    """Some raise an error of their own, the server after its tenth change."""
    model = Vector(torch.zeros(10))

    def fail(version: int = 10) -> None:
        if comm.rank in ranks and version == 10:
            raise ZeroDivisionError("its own")

    try:
        with async_sgd(model, comm, on_change=fail) as optimizer:
            for step in optimizer.work(range(10_000)):
                fail(10 if step == 3 else 0)
                model.x.grad = torch.ones(10)
                optimizer.step()
    except (ZeroDivisionError, ServerLost, WorkersLost) as error:
        return f"{type(error).__name__}: {error}"
    return "not told"


def refuse(comm: Any) -> list[str]:
    told = []
    different = [{"server": comm.rank % 2}, {"up": Compression.topk(ratio=8.0 + comm.rank, **SPARSE)}, {"server": 4}]
    for arguments in different:
        try:
            async_sgd(Vector(torch.zeros(COUNT)), comm, **arguments)
        except (RankMismatchError, ConfigurationError) as error:
            told.append(str(error))
    return told


class OnMpi(NamedTuple):
    trained: dict[str, Trained]
    poisoned: tuple[int, bool]
    looked: tuple[list[float], list[float]]
    misbehaved: str
    resumed: Resumed
    straggled: int
    flooded: str
    without_server: str
    without_workers: str
    refusals: list[str]


def on_4_ranks(folder: str) -> OnMpi:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    trained = {name: run(comm, arguments, f"{folder}/{name}") for name, arguments in VARIANTS.items()}
    others = poison(comm), look(comm), misbehave(comm), resume(comm), straggle(comm)
    warnings.simplefilter("ignore", RuntimeWarning)
    ends = flood(comm), end_by_errors(comm, (0,)), end_by_errors(comm, WORKERS)
    return OnMpi(trained, *others, *ends, refuse(comm))


class Results(NamedTuple):
    ranks: list[OnMpi]
    logs: Path

    def of(self, name: str) -> list[Trained]:
        return [result.trained[name] for result in self.ranks]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("logs")
    return Results(ranks(4, on_4_ranks, str(folder), timeout=200), folder)


def server_of(name: str) -> int:
    return int(VARIANTS[name].get("server", 0))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "FedAsync"])
def test_the_server_moves_by_all_that_workers_moved_but_for_what_is_unsent(results: Results, name: str) -> None:
    runs = results.of(name)
    sent = torch.stack([run.moved.double() - run.errors for run in runs if run.works]).sum(0)
    exact = "polyline" not in name and name != "four bits"
    server = server_of(name)
    torch.testing.assert_close(runs[server].model, (server - sent).float(), rtol=0, atol=0 if exact else 1e-4)
    assert any(bool(run.errors.any()) for run in runs) == (name not in ("dense", "period 3", "server works"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_worker_goes_on_from_what_it_was_sent_less_what_it_has_not_sent(results: Results, name: str) -> None:
    for rank, run in enumerate(results.of(name)):
        if rank != server_of(name):
            unsent = 0.0 if name == "error feedback" else run.errors
            assert torch.equal(run.model, run.held - unsent)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_push_is_one_change_and_has_one_answer(results: Results, name: str) -> None:
    period = VARIANTS[name].get("period", 1)
    runs = results.of(name)
    pushes = {rank: -(-(20 + rank) // period) for rank, run in enumerate(runs) if run.works}
    stats = runs[server_of(name)].stats
    assert {rank: counts.accepted for rank, counts in stats.workers.items()} == pushes
    assert stats.pushes == sum(pushes.values())
    assert 0 < stats.largest_staleness < stats.pushes


@pytest.mark.parametrize("name", VARIANTS)
def test_a_real_run_is_replayed_to_the_bit_without_mpi(results: Results, name: str) -> None:
    arguments, runs = VARIANTS[name], results.of(name)
    model, server = Vector(torch.zeros(COUNT)), runs[server_of(name)]
    codes = {way: arguments[way] for way in ("up", "down") if way in arguments}
    rule: Rule = FedAsync(alpha=0.5) if name == "FedAsync" else Plain()
    samples = {rank: 1 for rank, run in enumerate(runs) if run.works}
    store = replay(results.logs / name, model, rule, samples, **codes)
    assert torch.equal(store.model, server.model)
    assert torch.equal(model.x.detach(), server.model)
    assert store.stats.workers == server.stats.workers


@pytest.mark.parametrize(("name", "nbytes"), [("dense", 4 * COUNT), ("top-k", 484)])
def test_what_is_sent_is_the_code_and_16_bytes_a_message(results: Results, name: str, nbytes: int) -> None:
    for rank, run in enumerate(results.of(name)):
        pushes = run.stats.pushes
        payloads = pushes * (nbytes + 16) + (0 if rank else len(WORKERS) * (4 * COUNT + 16))  # whole models at first
        assert payloads <= run.stats.bytes_sent <= payloads + 60 * 16  # joins, ends, pings


def test_what_is_not_finite_stays_where_it_is(results: Results) -> None:
    assert [result.poisoned for result in results.ranks] == [(0, True), (0, True), (3, True), (0, True)]


def test_looking_at_the_servers_model_changes_nothing(results: Results) -> None:
    assert results.ranks[1].looked == ([0.0, -2.0, -2.0, -4.0], [-1.0, -2.0, -3.0, -4.0])


def test_a_message_of_a_wrong_length_ends_its_worker_alone(results: Results) -> None:
    server, first, second, third = (result.misbehaved for result in results.ranks)
    assert first == second == "12 pushes "
    reason = "its update cannot be read: 9 bytes, the whole vector has 4000"
    assert third == f"rank 3: the server turned this worker away: {reason}"
    assert server == f"28 pushes rank 0: worker 3 is turned away: {reason}"


def test_what_was_saved_in_the_middle_of_a_period_is_not_lost(results: Results) -> None:
    resumed = [result.resumed for result in results.ranks]
    assert all(part.unsent.any() for part in resumed[1:])
    moved = resumed[1].moved + resumed[2].moved + resumed[3].moved - resumed[3].unsent
    assert torch.equal(resumed[0].model, -moved)
    assert resumed[0].version == 3 * 2


def test_settings_that_differ_are_refused_alike_on_all_ranks(results: Results) -> None:
    for result in results.ranks:
        assert len(result.refusals) == 3
        assert result.refusals == results.ranks[0].refusals
    assert "server: rank 0 has 'server=0', rank 1 has 'server=1'" in results.ranks[0].refusals[0]
    assert "ratio=8.0" in results.ranks[0].refusals[1]
    assert "server must be a rank below 4, got 4" in results.ranks[0].refusals[2]


def test_a_slow_worker_does_not_hold_up_the_others(results: Results) -> None:
    """Proved by order, not by time: all of the others' pushes fall into one of its steps."""
    assert [result.straggled for result in results.ranks] == [42, 2, 20, 20]


def test_a_message_larger_than_any_may_be_is_not_received(results: Results) -> None:
    assert [result.flooded for result in results.ranks[:3]] == ["10 pushes", "5 pushes", "5 pushes"]
    assert "longer than any may be" in results.ranks[3].flooded


def test_an_error_of_the_server_is_an_error_of_every_worker(results: Results) -> None:
    server, *workers = (result.without_server for result in results.ranks)
    assert server == "ZeroDivisionError: its own"
    for rank, told in enumerate(workers, start=1):
        assert told == f"ServerLost: rank {rank}: the server, rank 0, has ended by an error"


def test_a_server_that_all_workers_leave_by_errors_ends(results: Results) -> None:
    server, *workers = (result.without_workers for result in results.ranks)
    assert server == "WorkersLost: rank 0: none of the 3 workers is left"
    assert workers == ["ZeroDivisionError: its own"] * 3


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
        ({"proximal": -1.0}, "proximal must be at least 0"),
        ({"memory": "all"}, "memory must be one of"),
        ({"patience": 0.0}, "patience must be a positive number"),
        ({"samples": 0}, "samples must be at least 1"),
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
