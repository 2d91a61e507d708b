"""ADSAGA: its known answers, SAGA to the bit, the mean of the table, and a linear rate on real ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hvd_sketch import ConfigurationError
from hvd_sketch.methods.server import ADSAGA
from hvd_sketch.methods.server.rules.saga import OnLost, Saga
from tests.methods.server.conftest import Together
from tests.methods.server.finite_sum import DIM, SIZE, OnMpi, Regression, adsaga, saga, step
from tests.methods.server.support import Server, Vector, vector

FACTORS, TARGETS = (1.0, 2.0, 1.0, 3.0), (1.0, 0.0, 2.0, 3.0)
PUSHES = [  # worker, component, h, x, average
    (1, 0, -1.0, 0.1, -0.25),
    (2, 2, -2.0, 0.325, -0.75),
    (1, 1, 0.4, 0.36, -0.65),
    (2, 3, -6.075, 1.0325, -2.16875),
    (2, 2, 1.0325, 1.146125, -1.910625),
    (1, 0, 0.36, 1.3011875, -1.820625),
]


class Table:
    """The workers' side: each component's last gradient, pushed from the model that its worker has."""

    def __init__(self, on_lost: OnLost = "keep") -> None:
        self.rule = Saga(0.1, on_lost)
        self.server = Server(self.rule, vector(0.0), {1: 2, 2: 2})
        self.table = [0.0] * 4

    def push(self, worker: int, component: int) -> float:
        x = float(self.server.models[worker])
        gradient = FACTORS[component] * (FACTORS[component] * x - TARGETS[component])
        h, self.table[component] = gradient - self.table[component], gradient
        self.server.push(worker, vector(h))
        return h


def test_known_answers() -> None:
    table = Table()
    for worker, component, h, x, average in PUSHES:
        assert table.push(worker, component) == pytest.approx(h, abs=1e-12)
        assert float(table.server.model) == pytest.approx(x, abs=1e-12)
        assert float(table.rule.average) == pytest.approx(average, abs=1e-12)
        assert float(table.rule.average) == pytest.approx(sum(table.table) / 4, abs=1e-12)


def test_the_minimiser_stays_where_it_is() -> None:
    table = Table()
    optimum = sum(a * b for a, b in zip(FACTORS, TARGETS, strict=True)) / sum(a * a for a in FACTORS)
    table.server.model.fill_(optimum)
    table.table = [a * (a * optimum - b) for a, b in zip(FACTORS, TARGETS, strict=True)]
    for worker in (1, 2):
        table.server.take(table.server.store.join(worker, 0, False, 0.0))
        for component in (2 * worker - 2, 2 * worker - 1):
            assert table.push(worker, component) == pytest.approx(0.0, abs=1e-15)
    assert float(table.server.model) == pytest.approx(optimum, abs=1e-15)


def test_a_lost_and_returned_worker_leaves_the_average_true() -> None:
    for on_lost in ("keep", "remove"):
        table = Table(on_lost)
        for worker, component, *_ in PUSHES[:4]:
            table.push(worker, component)
        table.server.store.leave(2, True, 9.0)
        counted, n = (table.table, 4) if on_lost == "keep" else (table.table[:2], 2)
        for component in (0, 1, 0):
            table.push(1, component)
            counted = table.table if on_lost == "keep" else table.table[:2]
            assert float(table.rule.average) == pytest.approx(sum(counted) / n, abs=1e-12)
        table.push(2, 3)  # from the model that it had been sent
        assert float(table.rule.average) == pytest.approx(sum(table.table) / 4, abs=1e-12)


@pytest.mark.parametrize("on_lost", ["keep", "remove"])
def test_a_worker_that_begins_anew_takes_its_part_out(on_lost: OnLost) -> None:
    table = Table(on_lost)
    for worker, component, *_ in PUSHES[:4]:
        table.push(worker, component)
    table.server.store.leave(2, True, 9.0)
    table.server.take(table.server.store.join(2, 0, True, 10.0))
    table.table[2:] = [0.0, 0.0]
    assert float(table.rule.average) == pytest.approx(sum(table.table) / 4, abs=1e-12)
    table.push(2, 2)
    assert float(table.rule.average) == pytest.approx(sum(table.table) / 4, abs=1e-12)


def test_one_worker_that_waits_is_saga_to_the_bit() -> None:
    from mpi4py import MPI

    problem = Regression()
    with adsaga(MPI.COMM_SELF, problem, SIZE, server_works=True, seed=5) as optimizer:
        for component in optimizer.work(300):
            step(optimizer, problem, component)
    expected = saga(problem, 300, 1.0 / (6.0 * problem.smoothness), 5)
    assert torch.equal(optimizer.model.get_parameter("x").detach(), expected)
    assert torch.linalg.vector_norm(optimizer.table.mean(0) - optimizer.average) < 1e-14


@pytest.fixture(scope="module")
def results(together: Together) -> list[OnMpi]:
    return [rank.finite_sum for rank in together.ranks]


def test_the_rate_is_linear_to_the_last_digit_on_real_ranks(results: list[OnMpi]) -> None:
    squared = results[0].converged.squared
    assert squared[-1] < 1e-20
    logarithms = torch.tensor([math.log10(value) for value in squared if value > 1e-20], dtype=torch.float64)
    steps = torch.arange(len(logarithms), dtype=torch.float64)
    assert logarithms[0] - logarithms[-1] > 8
    assert float(torch.corrcoef(torch.stack([steps, logarithms]))[0, 1]) ** 2 > 0.98


def test_asynchronous_sgd_stops_at_a_distance(results: list[OnMpi]) -> None:
    assert results[0].converged.plain > 1e-5


def test_the_server_s_average_is_the_tables_on_real_ranks(results: list[OnMpi]) -> None:
    assert results[0].converged.average_error < 1e-12


def test_tables_and_average_of_one_moment_go_on_and_others_are_refused(results: list[OnMpi]) -> None:
    assert results[0].resumed[0] < 1e-12  # though worker 1 began with an empty table
    assert [len(told) for _, told in (result.resumed for result in results)] == [0, 1, 0, 0, 0]
    assert "its state is of another moment than the server's" in results[1].resumed[1][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smoothness": None}, "give smoothness"),
        ({"smoothness": 0.0}, "smoothness must be above 0"),
        ({"smoothness": math.inf}, "smoothness must be above 0 and finite"),
        ({"rate": -1.0}, "rate must be above 0"),
        ({"on_lost": "forget"}, "on_lost must be"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"ADSAGA: {message}"):
        adsaga(None, Regression(), 3, **arguments)


def test_components_out_of_range_and_gradients_that_are_not_finite_are_not_pushed() -> None:
    from mpi4py import MPI

    with adsaga(MPI.COMM_SELF, Regression(), 3, server_works=True) as optimizer:
        with pytest.raises(ConfigurationError, match="rank 0: component must be from 0 to 2, got 3"):
            optimizer.step(3)
        with pytest.raises(ConfigurationError, match="component must be a whole number, got 1.5"):
            optimizer.step(1.5)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="steps must be a number, got '9'"):
            optimizer.work("9")  # type: ignore[arg-type]
        optimizer.model.get_parameter("x").grad = torch.full((DIM,), math.nan, dtype=torch.float64)
        optimizer.step(0)
    assert (optimizer.stats.skipped, optimizer.stats.pushes) == (1, 0)
    assert not optimizer.table.any()


def test_a_large_table_is_warned_of() -> None:
    from mpi4py import MPI

    model = Vector(torch.zeros(2**21, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match=r"the table of 65 gradients takes 1.0 GiB"):
        ADSAGA(model, MPI.COMM_SELF, components=65, smoothness=1.0, server_works=True)._engine.leave()
