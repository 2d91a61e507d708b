"""DmSGD and DecentLaM: the published equations, their bias, and what the wrapper must do for any optimizer."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from hvd_sketch import wire
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.methods.gossip.decentlam import DecentLaM, DmSGD
from hvd_sketch.methods.graphs import graph_of, spectral_gap
from tests.support.quadratics import SIZE, Point, Quadratics, distances
from tests.support.ranks import ranks

METHODS = {"DmSGD": DmSGD, "DecentLaM": DecentLaM}


GRAPHS = ("ring", "torus", "hypercube")


class OnMpi(NamedTuple):
    """Distances to the optimum by method; by graph, consensus distances step by step and the bytes for them."""

    bias: dict[str, float]
    consensus: dict[str, tuple[list[float], int]]


def run_on_mpi() -> OnMpi:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD

    def bias(method: Any, rate: float, momentum: float) -> float:
        def make(model: Point) -> Any:
            return method(torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum), model, comm, "ring")

        return distances(make, comm.rank, comm.size, 500, 500)[-1]

    def consensus(graph: str) -> tuple[list[float], int]:
        eigen = torch.linalg.eigh(graph_of(graph, comm.size).mixing())
        second = int(eigen.eigenvalues.abs().argsort()[-2])
        model = Point()
        model.x.data.fill_(float(eigen.eigenvectors[comm.rank, second]))
        optimizer = DmSGD(torch.optim.SGD(model.parameters(), lr=0.0), model, comm, graph, same_start=False)
        seen = [optimizer.consensus_distance()]
        for _ in range(5):
            optimizer.step()
            seen.append(optimizer.consensus_distance())
        return seen, optimizer.stats.bytes_sent

    found = {"DmSGD": bias(DmSGD, 0.02, 0.9), "DecentLaM": bias(DecentLaM, 0.02, 0.9), "DSGD": bias(DmSGD, 0.2, 0.0)}
    return OnMpi(found, {graph: consensus(graph) for graph in GRAPHS})


@pytest.fixture(scope="module")
def on_8_ranks() -> list[OnMpi]:
    return ranks(8, run_on_mpi, timeout=250)


def test_decentlam_has_the_smaller_bias_on_heterogeneous_data(on_8_ranks: list[OnMpi]) -> None:
    bias = {name: max(result.bias[name] for result in on_8_ranks) for name in on_8_ranks[0].bias}
    assert bias["DecentLaM"] < bias["DmSGD"] / 2
    assert bias["DmSGD"] == pytest.approx(bias["DSGD"], rel=1e-6)  # which has lr / (1 - beta) and no momentum


def test_decentlam_ends_where_decentralised_sgd_on_the_lazy_weights_does() -> None:
    """Whose fixed point is ``x_i = sum_j a_ij (x_j - lr g_j)``, linear for quadratics."""
    size, rate, problem = 4, 0.05, Quadratics(4)

    def body(comm: Communicator) -> torch.Tensor:
        model = Point()
        optimizer = DecentLaM(torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5), model, comm, "ring")
        for _ in range(80):
            optimizer.zero_grad()
            problem.loss(comm.rank, model.x).backward()
            optimizer.step()
        return model.x.detach()

    def fixed_point(*, lazy: bool) -> torch.Tensor:
        eye = torch.eye(size * SIZE, dtype=torch.float64)
        mixing = torch.kron(graph_of("ring", size).mixing(lazy=lazy), eye[:SIZE, :SIZE])
        pull = rate * mixing @ torch.block_diag(*problem.matrices)
        point: torch.Tensor = torch.linalg.solve(eye - mixing + pull, pull @ torch.cat(problem.centres))
        return point.view(size, SIZE)

    found, lazy, eager = torch.stack(run_in_process(size, body)), fixed_point(lazy=True), fixed_point(lazy=False)
    torch.testing.assert_close(found, lazy, rtol=0, atol=1e-7)
    assert (found - problem.optimum).norm() > 1.5 * (eager - problem.optimum).norm()


@pytest.mark.parametrize("graph", GRAPHS)
def test_consensus_contracts_by_the_spectral_gap(on_8_ranks: list[OnMpi], graph: str) -> None:
    structure = graph_of(graph, 8)
    for rank, result in enumerate(on_8_ranks):
        seen, sent = result.consensus[graph]
        rates = [after / before for before, after in pairwise(seen)]
        assert rates == pytest.approx([1 - spectral_gap(structure.mixing())] * 5, rel=1e-9)
        assert sent == 5 * len(structure.neighbours[rank]) * (SIZE * 8 + wire.SEAL)


@pytest.mark.parametrize("name", METHODS)
def test_the_steps_are_the_published_ones(name: str) -> None:
    size, rate, beta, decay, steps = 4, 0.05, 0.8, 0.1, 6
    problem = Quadratics(size)

    def body(comm: Communicator) -> torch.Tensor:
        model = Point()
        sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=beta, weight_decay=decay)
        optimizer = METHODS[name](sgd, model, comm, "ring")
        for _ in range(steps):
            optimizer.zero_grad()
            problem.loss(comm.rank, model.x).backward()
            optimizer.step()
        return model.x.detach()

    weights = graph_of("ring", size).mixing(lazy=name == "DecentLaM")
    x = momentum = torch.zeros(size, SIZE, dtype=torch.float64)
    for _ in range(steps):
        pulls = [problem.matrices[i] @ (x[i] - problem.centres[i]) for i in range(size)]
        gradient = torch.stack(pulls) + decay * x
        if name == "DmSGD":
            momentum = beta * momentum + gradient
            x = weights @ (x - rate * momentum)
        else:
            momentum = beta * momentum + (x - weights @ (x - rate * gradient)) / rate
            x = x - rate * momentum
    assert torch.allclose(torch.stack(run_in_process(size, body)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_nan_on_one_rank_does_not_spread(name: str) -> None:
    def body(comm: Communicator) -> tuple[bool, int]:
        model = Point()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = METHODS[name](sgd, model, comm, "complete")
        for step in range(6):
            model.x.grad = torch.full((SIZE,), math.nan if comm.rank == 1 and step == 2 else 1.0, dtype=torch.float64)
            optimizer.step()
        return bool(model.x.isfinite().all()), optimizer.stats.skipped

    results = run_in_process(3, body)
    assert all(finite for finite, _ in results)
    assert [skipped for _, skipped in results] == [0, 1, 0]


def test_the_average_model_is_there_inside_and_gone_afterwards() -> None:
    def body(comm: Communicator) -> None:
        norm = torch.nn.BatchNorm1d(4)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), norm)
        optimizer = DmSGD(torch.optim.SGD(model.parameters(), lr=0.1), model, comm, "ring", same_start=False)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(comm.rank)
        with optimizer.average_model() as averaged:
            assert averaged is model
            assert all(bool((tensor == 1.5).all()) for tensor in model.parameters())
            assert torch.equal(norm.state_dict()["running_mean"], torch.full((4,), 1.5))  # a buffer's mean, too
            assert norm.state_dict()["num_batches_tracked"] == comm.rank
            with pytest.raises(RuntimeError, match="inside average_model"):
                optimizer.step()
        assert all(bool((tensor == comm.rank).all()) for tensor in (*model.parameters(), *model.buffers()))
        assert optimizer.consensus_distance() == pytest.approx(math.sqrt(1.25 * (3 * 4 + 4 + 4 + 4)))

    run_in_process(4, body)


def test_a_buffer_that_is_nan_on_one_rank_does_not_spread() -> None:
    """As BatchNorm's statistics are after one bad batch; infinite buffers, such as masks, stay what they are."""

    def body(comm: Communicator) -> tuple[list[float], bool]:
        model = torch.nn.BatchNorm1d(3)
        mean = model.get_buffer("running_mean")
        optimizer = DmSGD(torch.optim.SGD(model.parameters(), lr=0.1), model, comm, "ring")
        mean.copy_(torch.tensor([comm.rank, math.nan if comm.rank == 1 else comm.rank, -math.inf]))
        with optimizer.average_model():
            averaged = mean.tolist()
        return averaged, bool(mean[1].isnan())

    for rank, (averaged, own) in enumerate(run_in_process(4, body)):
        assert averaged == [1.5, pytest.approx(5 / 3), -math.inf]
        assert own == (rank == 1)


def test_it_is_used_like_the_optimizer_that_it_wraps() -> None:
    model = Point()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = DmSGD(sgd, model, SingleProcess(), "complete")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model.x - 1).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == SIZE
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"] == 0.05
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert "momentum_buffer" in optimizer.state[model.x]
    with pytest.raises(ConfigurationError, match="before wrapping"):
        optimizer.add_param_group({"params": []})


def test_the_same_start_is_rank_0s() -> None:
    def body(comm: Communicator) -> torch.Tensor:
        model = Point()
        model.x.data.fill_(comm.rank + 5)
        DmSGD(torch.optim.SGD(model.parameters(), lr=0.1), model, comm)
        return model.x.detach()

    assert all(bool((x == 5).all()) for x in run_in_process(3, body))


def test_the_same_start_leaves_buffers_that_are_not_saved_alone() -> None:
    """A rank's own scratch memory, and of any size: it is neither compared, sent nor averaged."""

    class Scratch(Point):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.register_buffer("kept", torch.full((2,), rank + 5.0))
            self.inner = torch.nn.Module()
            self.inner.register_buffer("scratch", torch.full((rank + 1,), rank + 5.0), persistent=False)

    def body(comm: Communicator) -> tuple[list[float], list[float], list[float]]:
        model = Scratch(comm.rank)
        optimizer = DmSGD(torch.optim.SGD(model.parameters(), lr=0.1), model, comm)
        kept, scratch = model.get_buffer("kept"), model.get_buffer("inner.scratch")
        started = kept.tolist()
        with optimizer.average_model():
            return started, kept.tolist(), scratch.tolist()

    for rank, seen in enumerate(run_in_process(3, body)):
        assert seen == ([5.0] * 2, [5.0] * 2, [rank + 5.0] * (rank + 1))


def test_bad_settings_are_refused_alike_on_all_ranks() -> None:
    model = Point()
    with pytest.raises(ConfigurationError, match="not the model's"):
        DmSGD(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), model, SingleProcess())
    with pytest.raises(ConfigurationError, match="LBFGS"):
        DmSGD(torch.optim.LBFGS(model.parameters()), model, SingleProcess())
    with pytest.raises(ConfigurationError, match="not of Adam"):
        DecentLaM(torch.optim.Adam(model.parameters()), model, SingleProcess())
    with pytest.raises(ConfigurationError, match="maximize"):
        DecentLaM(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), model, SingleProcess())

    def differing_graphs(comm: Communicator) -> None:
        other = Point()
        graph = "ring" if comm.rank else "complete"
        with pytest.raises(RankMismatchError, match=r"graph: rank 0 has .* rank 1 has"):
            DmSGD(torch.optim.SGD(other.parameters(), lr=0.1), other, comm, graph)

    run_in_process(4, differing_graphs)
