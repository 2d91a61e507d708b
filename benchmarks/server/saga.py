"""Least squares spread over workers: ADSAGA beside asynchronous SGD, synchronous SAGA and the full gradient.

``mpirun -np 9 --map-by slot:OVERSUBSCRIBE --bind-to none python -m benchmarks.server.saga --seeds 0 1``

A component's gradient takes a hundredth of a second, asleep. Rows have the squared distance to the minimiser over
time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import hvd_sketch as hvd
from benchmarks.server import rows
from benchmarks.server.rows import Row

WORLD = MPI.COMM_WORLD
SIZE, DIM = 240, 20
GRADIENT = 0.01  # seconds
MARKS = 60


class Problem(nn.Module):
    """Least squares with Gaussian rows and noise 1, float64, the components shared out among the workers."""

    def __init__(self, seed: int, number: int, workers: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(SIZE, DIM, generator=generator, dtype=torch.float64)
        planted = torch.randn(DIM, generator=generator, dtype=torch.float64)
        self.targets = self.rows @ planted + torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.optimum = torch.linalg.lstsq(self.rows, self.targets).solution
        self.smoothness = float(self.rows.square().sum(1).max())
        self.first, stop = SIZE * number // workers, SIZE * (number + 1) // workers
        self.components = stop - self.first
        self.x = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))

    def backward(self, component: int) -> None:
        """Put the gradient of one of this worker's components into the parameter's."""
        time.sleep(GRADIENT)
        row = self.rows[self.first + component]
        self.x.grad = row * (torch.dot(row, self.x.detach()) - self.targets[self.first + component])

    def distance(self, x: Tensor) -> float:
        """Squared, to the minimiser."""
        return float((x - self.optimum).square().sum())


class Curve:
    """Distances at evenly spread moments."""

    def __init__(self, problem: Problem, seconds: float) -> None:
        self._problem, self._seconds, self._start = problem, seconds, time.monotonic()
        self.points: list[tuple[float, int, float]] = []

    def look(self, x: Tensor, updates: int) -> None:
        """Keep a point if the next moment has come."""
        now = time.monotonic() - self._start
        if now >= len(self.points) * self._seconds / MARKS:
            self.points.append((round(now, 3), updates, self._problem.distance(x)))

    def going(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() - self._start < self._seconds


def adsaga(comm: Any, problem: Problem, curve: Curve) -> None:
    """Every worker until the time is over."""
    optimizer: Any = hvd.ADSAGA(
        problem,
        comm,
        components=problem.components,
        rate=1.0 / (3.0 * problem.smoothness),
        on_change=lambda version: curve.look(served(optimizer), version),
    )
    with optimizer:
        for component in optimizer.work(10**9):
            problem.backward(component)
            optimizer.step(component)
            if not curve.going():
                break


def async_sgd(comm: Any, problem: Problem, curve: Curve) -> None:
    """At a rate that reaches its distance in the time."""
    generator = torch.Generator().manual_seed(comm.rank)
    sgd = torch.optim.SGD(problem.parameters(), lr=1e-3)
    optimizer: Any = hvd.AsyncSGD(sgd, problem, comm, on_change=lambda version: curve.look(served(optimizer), version))
    with optimizer:
        for component in optimizer.work(draws(problem, generator, curve)):
            problem.backward(component)
            optimizer.step()


def served(optimizer: Any) -> Tensor:
    """The server's model, on its rank."""
    with optimizer.server_model() as model:
        here: Tensor = model.x.detach().clone()
        return here


def draws(problem: Problem, generator: torch.Generator, curve: Curve) -> Iterator[int]:
    """Components at random while there is time."""
    while curve.going():
        yield int(torch.randint(problem.components, (1,), generator=generator))


def synchronous_saga(comm: Any, problem: Problem, curve: Curve) -> None:
    """All workers' pushes from one model, then the next."""
    table, average = torch.zeros(problem.components, DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    generator, rate = torch.Generator().manual_seed(comm.rank), 1.0 / (3.0 * problem.smoothness)
    together(comm, curve)
    while comm.bcast(curve.going()):
        new = torch.zeros(DIM, dtype=torch.float64)
        if comm.rank:
            component = int(torch.randint(problem.components, (1,), generator=generator))
            problem.backward(component)
            assert problem.x.grad is not None
            new = problem.x.grad - table[component]
            table[component] = problem.x.grad
        total = sum_over(comm, new)
        problem.x.data.sub_(total + (comm.size - 1) * average, alpha=rate)
        average += total / SIZE
        curve.look(problem.x.detach(), 0)


def full_gradient(comm: Any, problem: Problem, curve: Curve) -> None:
    """Gradient descent at the best fixed rate; every worker has all of its components in every step."""
    values = torch.linalg.eigvalsh(problem.rows.T @ problem.rows / SIZE)
    rate = 2.0 / float(values[0] + values[-1])
    together(comm, curve)
    while comm.bcast(curve.going()):
        mine = torch.zeros(DIM, dtype=torch.float64)
        for component in range(problem.components if comm.rank else 0):
            problem.backward(component)
            assert problem.x.grad is not None
            mine += problem.x.grad / SIZE
        problem.x.data.sub_(sum_over(comm, mine), alpha=rate)
        curve.look(problem.x.detach(), 0)


def together(comm: Any, curve: Curve) -> None:
    """Begin at the same moment."""
    comm.barrier()
    curve._start = time.monotonic()


def sum_over(comm: Any, vector: Tensor) -> Tensor:
    """Over the ranks."""
    total = torch.empty_like(vector)
    comm.Allreduce(vector.numpy(), total.numpy())
    return total


METHODS: dict[str, Callable[[Any, Problem, Curve], None]] = {
    "ADSAGA": adsaga,
    "async SGD": async_sgd,
    "synchronous SAGA": synchronous_saga,
    "full gradient": full_gradient,
}


def run(cell: Row, seconds: float) -> Row:
    """On the first ranks only; the others sleep."""
    workers = cell["workers"]
    comm = WORLD.Split(WORLD.rank <= workers)
    curve = None
    if WORLD.rank <= workers:
        problem = Problem(cell["seed"], max(comm.rank - 1, 0), workers)
        curve = Curve(problem, seconds)
        METHODS[cell["method"]](comm, problem, curve)
    done = WORLD.Ibarrier()
    while not done.Test():
        time.sleep(0.05)
    return {"points": curve.points if curve is not None else []}


def main() -> None:
    """Measure what is missing."""
    parser = rows.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # with the first one PyTorch imports its compiler: seconds
    cells = [
        cell
        for cell in rows.grid(seed=options.seeds, method=METHODS, workers=(2, 4, 8))
        if cell["method"] == "ADSAGA" or cell["workers"] == 8
    ]
    rows.fill("saga", cells, lambda cell: run(cell, options.seconds), options.results, WORLD)


if __name__ == "__main__":
    main()
