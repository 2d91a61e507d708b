"""LEAD: linear convergence on heterogeneous data, what it sends, and what it refuses."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from hvd_sketch import wire
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.gossip.infnorm import InfNorm
from hvd_sketch.methods.gossip.lead import LEAD
from hvd_sketch.methods.graphs import graph_of
from tests.support.quadratics import SIZE, Point, distances
from tests.support.ranks import ranks

RUNS = {
    "ring, 2 bits": ("ring", 2, 0.5),
    "ring, 4 bits": ("ring", 4, 1.0),
    "torus, 4 bits": ("torus", 4, 1.0),
    "hypercube, 4 bits": ("hypercube", 4, 1.0),
    "complete, 8 bits": ("complete", 8, 1.0),
}
STEPS, EVERY = 400, 50


class Run(NamedTuple):
    """Distances to the optimum of one rank, every `EVERY` steps, and what it sent."""

    distances: list[float]
    bytes_sent: int


def lead_on_mpi() -> dict[str, Run]:
    from mpi4py import MPI

    comm, results = MPI.COMM_WORLD, {}
    for name, (graph, bits, gamma) in RUNS.items():
        made: list[LEAD] = []

        def make(
            model: Point, graph: str = graph, bits: int = bits, gamma: float = gamma, made: list[LEAD] = made
        ) -> LEAD:
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            made.append(LEAD(sgd, model, comm, graph, quantization=InfNorm(bits), gamma=gamma))
            return made[0]

        seen = distances(make, comm.rank, comm.size, STEPS, EVERY)
        results[name] = Run(seen, made[0].stats.bytes_sent)
    return results


@pytest.fixture(scope="module")
def on_8_ranks() -> list[dict[str, Run]]:
    return ranks(8, lead_on_mpi, timeout=250)


@pytest.mark.parametrize("name", RUNS)
def test_it_converges_linearly_to_1e_10(on_8_ranks: list[dict[str, Run]], name: str) -> None:
    worst = [max(runs[name].distances[i] for runs in on_8_ranks) for i in range(STEPS // EVERY)]
    assert worst[-1] < 1e-10
    for before, after in pairwise(worst):  # by a factor in every interval, until rounding ends it
        assert after < before / 5 or after < 1e-10


@pytest.mark.parametrize("name", RUNS)
def test_it_sends_the_quantised_difference_to_each_neighbour(on_8_ranks: list[dict[str, Run]], name: str) -> None:
    graph, bits, _ = RUNS[name]
    message = 4 + 512 * bits // 8 + wire.SEAL
    for rank, runs in enumerate(on_8_ranks):
        assert runs[name].bytes_sent == (STEPS - 1) * len(graph_of(graph, 8).neighbours[rank]) * message


def test_the_dual_sums_to_zero_and_hw_is_the_mixed_h() -> None:
    def body(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made: list[LEAD] = []

        def make(model: Point) -> LEAD:
            made.append(LEAD(torch.optim.SGD(model.parameters(), lr=0.1), model, comm, "ring"))
            return made[0]

        distances(make, comm.rank, comm.size, 30, 30)
        return made[0]._dual, made[0]._seen, made[0]._seen_mixed

    results = run_in_process(4, body)
    dual, seen, mixed = (torch.stack(parts) for parts in zip(*results, strict=True))
    assert float(dual.sum(dim=0).abs().max()) < 1e-12 * float(dual.abs().max())
    ring = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.float64) / 3
    assert torch.allclose(mixed, ring @ seen, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_does_not_spread() -> None:
    def body(comm: Communicator) -> tuple[bool, int]:
        model = Point()
        optimizer = LEAD(torch.optim.SGD(model.parameters(), lr=0.1), model, comm, "complete")
        for step in range(6):
            model.x.grad = torch.full((SIZE,), math.nan if comm.rank == 1 and step == 2 else 1.0, dtype=torch.float64)
            optimizer.step()
        return bool(model.x.isfinite().all()), optimizer.stats.skipped

    results = run_in_process(3, body)
    assert all(finite for finite, _ in results)
    assert [skipped for _, skipped in results] == [0, 1, 0]


def test_weight_decay_is_part_of_the_gradient() -> None:
    model = Point()
    model.x.data.fill_(2.0)
    optimizer = LEAD(torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1), model, SingleProcess(), "complete")
    model.x.grad = torch.zeros(SIZE, dtype=torch.float64)
    optimizer.step()
    assert torch.allclose(model.x, torch.full((SIZE,), 1.9, dtype=torch.float64))


def test_bad_settings_are_refused() -> None:
    model, comm = Point(), SingleProcess()
    with pytest.raises(ConfigurationError, match="no momentum"):
        LEAD(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, comm)
    with pytest.raises(ConfigurationError, match="not of Adam"):
        LEAD(torch.optim.Adam(model.parameters()), model, comm)
    with pytest.raises(ConfigurationError, match="alpha"):
        LEAD(torch.optim.SGD(model.parameters(), lr=0.1), model, comm, alpha=0.0)
    optimizer = LEAD(torch.optim.SGD(model.parameters(), lr=0.0), model, comm)
    with pytest.raises(ConfigurationError, match="above 0"):
        optimizer.step()
