"""Least squares over ranks, and what ranks do with `ADSAGA` for the tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch.methods.server import ADSAGA, AsyncSGD, TurnedAway
from tests.methods.server.support import Vector

SIZE, DIM = 60, 5


class Regression:
    """Least squares ``sum of (a_l x - b_l)^2 / 2`` over the workers' shares, float64."""

    def __init__(self, size: int = SIZE, dim: int = DIM) -> None:
        generator = torch.Generator().manual_seed(2)
        self.rows = torch.randn(size, dim, generator=generator, dtype=torch.float64)
        planted = torch.randn(dim, generator=generator, dtype=torch.float64)
        self.targets = self.rows @ planted + torch.randn(size, generator=generator, dtype=torch.float64)
        self.optimum = torch.linalg.lstsq(self.rows, self.targets).solution
        self.smoothness = float(self.rows.square().sum(1).max())

    def loss(self, x: Tensor, component: int) -> Tensor:
        return (torch.dot(self.rows[component], x) - self.targets[component]).square() / 2


def saga(problem: Regression, steps: int, rate: float, seed: int) -> Tensor:
    """SAGA as in its paper, for all components."""
    x, table = torch.zeros(DIM, dtype=torch.float64), torch.zeros(SIZE, DIM, dtype=torch.float64)
    average, generator = torch.zeros(DIM, dtype=torch.float64), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        component = int(torch.randint(SIZE, (1,), generator=generator))
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.loss(at, component), at)
        h = gradient - table[component]
        x = x.sub(h + average, alpha=rate)
        average = average + h / SIZE
        table[component] = gradient
    return x


def adsaga(comm: Any, problem: Regression, components: int, **arguments: Any) -> ADSAGA:
    model = Vector(torch.zeros(DIM, dtype=torch.float64))
    settings = {"smoothness": problem.smoothness, "patience": 30.0, **arguments}
    return ADSAGA(model, comm, components=components, **settings)


def step(optimizer: ADSAGA, problem: Regression, component: int, first: int = 0) -> None:
    x = optimizer.model.get_parameter("x")
    x.grad = None
    problem.loss(x, first + component).backward()
    optimizer.step(component)


class Converged(NamedTuple):
    squared: list[float]
    average_error: float
    plain: float


def share(comm: Any, size: int) -> tuple[int, int]:
    """The first component and the number of components of a worker; of the server's rank none."""
    workers = comm.size - 1
    cuts = [size * number // workers for number in range(workers + 1)]
    number = max(comm.rank - 1, 0)
    return cuts[number], cuts[number + 1] - cuts[number]


def converge(comm: Any, steps: int, marks: int) -> Converged:
    """The squared distance to the minimiser along the way, as the server's rank sees it."""
    problem, squared = Regression(), list[float]()
    first, count = share(comm, SIZE)

    def look(version: int) -> None:
        if version % marks == 0:
            served = optimizer._engine.store
            assert served is not None
            squared.append(float((served.model - problem.optimum).square().sum()))

    optimizer = adsaga(comm, problem, count, on_change=look, rate=1.0 / (3.0 * problem.smoothness))
    with optimizer:
        for component in optimizer.work(steps // (comm.size - 1)):
            step(optimizer, problem, component, first)
    table = optimizer.table.sum(0) if comm.rank else torch.zeros(DIM, dtype=torch.float64)
    mean = torch.stack(comm.allgather(table)).sum(0) / SIZE
    error = float(torch.linalg.vector_norm(mean - optimizer.average)) if comm.rank == 0 else 0.0
    return Converged(squared, error, plain(comm, problem, first, count, steps))


def plain(comm: Any, problem: Regression, first: int, count: int, steps: int) -> float:
    """Asynchronous SGD of the same draws and number of steps: how far from the minimiser it stops."""
    model = Vector(torch.zeros(DIM, dtype=torch.float64))
    sgd = torch.optim.SGD(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(comm.rank)
    with AsyncSGD(sgd, model, comm, patience=30.0) as optimizer:
        for _ in optimizer.work(range(steps // (4 * (comm.size - 1)))):
            component = first + int(torch.randint(count, (1,), generator=generator))
            optimizer.zero_grad()
            problem.loss(model.x, component).backward()
            optimizer.step()
    return float((model.x.detach() - problem.optimum).square().sum())


def resume(comm: Any) -> tuple[float, list[str]]:
    """A block, a checkpoint at its end, and a second block: with it, with one table missing, with an old table."""
    problem = Regression()
    first, count = share(comm, SIZE)
    states: list[dict[str, Any]] = []
    told: list[str] = []
    for moment in (None, 0, "some", "old"):
        optimizer = adsaga(comm, problem, count)
        if moment is not None and not (moment == "some" and comm.rank == 1):
            optimizer.load_memory_state_dict(states[0 if moment == "old" and comm.rank == 1 else -1])
        try:
            with optimizer:
                for component in optimizer.work(60):
                    step(optimizer, problem, component, first)
        except TurnedAway as error:
            told.append(str(error))
        states.append(optimizer.memory_state_dict())
    total = torch.stack(comm.allgather(states[2]["table"].sum(0))).sum(0)
    average = states[2]["server"]["rule"]["average"] if comm.rank == 0 else torch.zeros(DIM)
    return float(torch.linalg.vector_norm(average - total / SIZE)), told


class OnMpi(NamedTuple):
    converged: Converged
    resumed: tuple[float, list[str]]


def on_ranks(comm: Any) -> OnMpi:
    return OnMpi(converge(comm, 4000, 100), resume(comm))
