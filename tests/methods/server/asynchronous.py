"""What ranks do with `AsyncSGD` for the tests, on one communicator one thing after the other."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError, RankMismatchError
from hvd_sketch.methods.server import (
    AsyncSGD,
    FedAsync,
    Krum,
    Polyline,
    ServerLost,
    ServerStats,
    TurnedAway,
    WorkersLost,
)
from tests.methods.server.support import Vector

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
    told = [str(warning.message) for warning in caught if warning.category is not ResourceWarning]
    return f"{optimizer.stats.pushes} pushes {''.join(told)}"


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
    settings: list[dict[str, Any]] = [
        *({"server": comm.rank % 2}, {"up": Compression.topk(ratio=8.0 + comm.rank, **SPARSE)}, {"server": 4}),
        *({"rule": Krum(1)}, {"rule": "mean"}, {"log": "/no/such/folder/log"}),  # what the server alone finds out
    ]
    for arguments in settings:
        try:
            async_sgd(Vector(torch.zeros(COUNT)), comm, **arguments)
        except (RankMismatchError, ConfigurationError, FileNotFoundError) as error:
            told.append(str(error))
    return told


class Begun(NamedTuple):
    frozen: float
    seen: float
    warned: list[str]


def begin(comm: Any) -> Begun:
    """Every rank has other weights, some of which do not train; the server's are loaded late."""
    model = Vector(torch.full((3,), float(comm.rank)))
    model.frozen = torch.nn.Parameter(torch.tensor([10.0 + comm.rank]), requires_grad=False)
    model.norm = torch.nn.BatchNorm1d(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = async_sgd(model, comm)
    if comm.rank == 0:
        model.x.data.fill_(7.0)
    with optimizer, optimizer.server_model():
        seen = float(model.x[0].detach())
    told = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    return Begun(float(model.frozen), seen, told)


def save_beside_a_worker(comm: Any) -> bool:
    """Whether what the server's rank saves after others have gone on is no work of its own."""
    model = Vector(torch.zeros(COUNT))
    with async_sgd(model, comm, server_works=True) as optimizer:
        train(optimizer, 2 if comm.rank == 0 else 8, comm.rank)
    return not optimizer.memory_state_dict()["errors"].any()


def nest(comm: Any) -> str:
    """Two blocks with one dedicated server, one within the other."""
    first, second = (async_sgd(Vector(torch.zeros(3)), comm) for _ in range(2))
    try:
        with first, second:
            return "both"
    except (RuntimeError, ServerLost) as error:
        second._engine.leave()
        return str(error)


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
    begun: Begun
    saved: bool
    nested: str


def on_4_ranks(comm: Any, folder: str) -> OnMpi:
    trained = {name: run(comm, arguments, f"{folder}/{name}") for name, arguments in VARIANTS.items()}
    others = poison(comm), look(comm), misbehave(comm), resume(comm), straggle(comm)
    warnings.simplefilter("ignore", RuntimeWarning)
    ends = flood(comm), end_by_errors(comm, (0,)), end_by_errors(comm, WORKERS)
    return OnMpi(trained, *others, *ends, refuse(comm), begin(comm), save_beside_a_worker(comm), nest(comm))
