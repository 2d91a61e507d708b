"""Rules by their known answers, held against independent implementations, and what holds for each of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch import ConfigurationError
from hvd_sketch.methods.server import (
    FedAsync,
    Gathered,
    Hinge,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Plain,
    Polynomial,
    Rule,
    Saga,
    Tiers,
    TrimmedMean,
    Zeno,
    ZenoPlus,
    ZenoPS,
    ZenoPSAsync,
)
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.log import Log, read_log
from hvd_sketch.methods.server.message import Note
from hvd_sketch.methods.server.store import Store
from tests.methods.server.support import Server, Vector, after_round, round_of, served, vector

ROWS = [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [4.0, 4.0], [100.0, -100.0]]
Floats = npt.NDArray[np.float64]


def distance_to(*target: float) -> Callable[[torch.nn.Module, int], Tensor]:
    """Half the squared distance of a vector to a target; its gradient at 0 is minus the target."""
    return lambda model, number: (model.get_parameter("x") - vector(*target)).square().sum() / 2


def slope(*gradient: float) -> Callable[[torch.nn.Module, int], Tensor]:
    """A loss with the same gradient everywhere."""
    return lambda model, number: torch.dot(model.get_parameter("x"), vector(*gradient))


def noisy(model: torch.nn.Module, number: int) -> Tensor:
    """A loss that differs from sample to sample."""
    x = model.get_parameter("x")
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(number), dtype=x.dtype)
    return (x - target).square().sum() / 2


RULES: dict[str, Callable[[], Rule]] = {
    "Plain": Plain,
    "FedAsync": FedAsync,
    "ZenoPlus": lambda: ZenoPlus(noisy, refresh=3, rho=0.0),
    "ZenoPlus, clipped": lambda: ZenoPlus(noisy, refresh=1, clip=True, raw_norm=True, max_staleness=2),
    "ZenoPSAsync": lambda: ZenoPSAsync(noisy, rate=0.1, steps=2, refresh=3),
    "ZenoPSAsync, as published": lambda: ZenoPSAsync([noisy] * 2, rate=0.1, refresh=1, per_tensor=True, reverse=True),
    "Mean": Mean,
    "Median": Median,
    "TrimmedMean": lambda: TrimmedMean(1),
    "Krum": lambda: Krum(1),
    "MultiKrum": lambda: MultiKrum(1, 2),
    "Zeno": lambda: Zeno(noisy, 2, rate=0.1),
    "ZenoPS": lambda: ZenoPS([noisy, noisy], rate=0.1, steps=2, zeta=-1.0, rho=1e6),
}
SYNCHRONOUS = [name for name, make in RULES.items() if isinstance(make(), Gathered)]
WORKERS = (1, 2, 3, 4, 5)


def train(server: Server, pushes: int) -> None:
    order, generator = random.Random(3), torch.Generator().manual_seed(3)
    for _ in range(pushes):
        worker = order.choice(sorted(server.versions))
        server.push(worker, torch.randn(6, generator=generator, dtype=torch.float64))


METHODS: dict[str, Callable[[], Rule]] = {
    "FedAT": lambda: Tiers(2, clients=1, retier=4),
    "ADSAGA": lambda: Saga(0.1, "remove"),
}


@pytest.mark.parametrize("name", [*RULES, *METHODS])
def test_a_replayed_log_gives_the_same_model_to_the_bit(tmp_path: Path, name: str) -> None:
    start = torch.zeros(6, dtype=torch.float64)
    make = {**RULES, **METHODS}[name]
    recorded = Server(make(), start, WORKERS, log=Log(tmp_path / "log"))
    train(recorded, 60)
    code, workers = Whole(6, torch.float64), served(Vector(start), dict.fromkeys(WORKERS, 1))
    again = Store(torch.ones_like(start), make(), workers, up=code, down=None)
    for event in read_log(tmp_path / "log"):
        again.repeat(event)
    assert recorded.model.any()
    assert torch.equal(again.model, recorded.model)
    assert again.stats == recorded.store.stats


@pytest.mark.parametrize("name", RULES)
def test_a_saved_rule_goes_on_alike(name: str) -> None:
    start = torch.zeros(6, dtype=torch.float64)
    one, other = (Server(RULES[name](), start, WORKERS) for _ in range(2))
    train(one, 35)  # whole rounds of five
    other.store.load_state_dict(one.store.state_dict())
    for server in (one, other):
        for worker in WORKERS:
            server.take(server.store.join(worker, 0, True, 0.0))
        train(server, 20)
    assert torch.equal(one.model, other.model)


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    updates = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    models = []
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        server = Server(RULES[name](), torch.zeros(6, dtype=torch.float64), WORKERS)
        for i in order:
            server.push(i + 1, updates[i])
        models.append(server.model)
    assert models[0].any()
    assert all(torch.equal(model, models[0]) for model in models)


def test_plain_is_the_sum_of_all_pushes_times_the_rate() -> None:
    server = Server(Plain(rate=0.5), vector(0.0))
    for worker, update in ((1, 1.0), (2, 2.0), (1, 4.0)):
        server.push(worker, vector(update))
    assert float(server.model) == -3.5


@pytest.mark.parametrize(
    ("rule", "staleness", "weight"),
    [
        *((FedAsync(), tau, weight) for tau, weight in ((0, 0.6), (1, 0.4243), (4, 0.2683), (9, 0.1897))),
        *((FedAsync(staleness=Hinge()), tau, weight) for tau, weight in ((0, 0.6), (4, 0.6), (9, 0.0118))),
        *((FedAsync(staleness=Polynomial(0.0)), tau, 0.6) for tau in (0, 9)),
    ],
)
def test_weights_of_fedasync(rule: FedAsync, staleness: int, weight: float) -> None:
    assert rule.weight(staleness) == pytest.approx(weight, abs=5e-5)


def test_fedasync_moves_towards_the_worker_s_model_not_by_its_update() -> None:
    """Worker 2 began at 0 and arrived at 1, when the server was at 4 already."""
    server = Server(FedAsync(alpha=0.5, staleness=Polynomial(0.0)), vector(0.0))
    server.push(1, vector(-8.0))
    assert float(server.model) == 4.0
    server.push(2, vector(-1.0))
    assert float(server.model) == 4.0 + 0.5 * (1.0 - 4.0)


@pytest.mark.parametrize(
    ("update", "score", "raw", "step"),
    [
        ((6.0, 8.0), 2.475, 2.4, (3.0, 4.0)),
        ((-6.0, -8.0), -2.525, -2.6, None),
        ((4.0, -3.0), -0.025, -0.025, None),
        ((0.3, 0.4), 2.475, 2.49975, (3.0, 4.0)),
        ((0.0, 0.0), None, None, None),
    ],
)
def test_scores_and_steps_of_zeno_plus(
    update: tuple[float, float], score: float | None, raw: float | None, step: tuple[float, float] | None
) -> None:
    rule = ZenoPlus(distance_to(-3.0, -4.0), rate=0.1, rho=0.001, tell=True)
    if score is not None:
        assert rule.score(vector(*update), vector(3.0, 4.0)) == pytest.approx(score)
        with_raw = ZenoPlus(distance_to(-3.0, -4.0), rate=0.1, rho=0.001, raw_norm=True)
        assert with_raw.score(vector(*update), vector(3.0, 4.0)) == pytest.approx(raw)
    server = Server(rule, vector(0.0, 0.0))
    server.push(1, vector(*update))
    assert server.notes[1] == (Note.REFUSED if step is None else Note.ACCEPTED)
    assert server.model.tolist() == pytest.approx([-0.1 * part for part in step or (0.0, 0.0)])


@given(st.floats(0.01, 1.0), st.floats(0.0, 0.1), st.floats(0.0, 2.0), st.floats(-3.0, 3.0), st.floats(0.01, 10.0))
def test_zeno_plus_is_a_test_of_the_angle(rate: float, rho: float, epsilon: float, angle: float, size: float) -> None:
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    bound = rho / rate - epsilon / 25.0
    if abs(cosine - bound) < 1e-9:
        return
    rule = ZenoPlus(noisy, rate=rate, rho=rho, epsilon=epsilon)
    turned = vector(3.0 * cosine - 4.0 * sine, 3.0 * sine + 4.0 * cosine)
    assert (rule.score(size * turned, vector(3.0, 4.0)) >= -rate * epsilon) == (cosine >= bound)


def test_zeno_plus_does_not_tell_an_attacker_unless_asked() -> None:
    server = Server(ZenoPlus(distance_to(-3.0, -4.0)), vector(0.0, 0.0))
    server.push(1, vector(-6.0, -8.0))
    assert (server.notes[1], server.store.stats.workers[1].refused) == (Note.NOTHING, 1)


def test_zeno_plus_can_be_no_longer_than_the_push_and_refuse_stale_ones() -> None:
    server = Server(ZenoPlus(distance_to(-3.0, -4.0), clip=True, unit=0.1, max_staleness=1), vector(0.0, 0.0), (1, 2))
    server.push(1, vector(0.006, 0.008))  # of a gradient (0.06, 0.08)
    assert server.model.tolist() == pytest.approx([-0.006, -0.008])
    server.push(1, vector(3.0, 4.0))
    assert server.push(2, vector(3.0, 4.0)) == [2]  # two changes old
    assert server.store.stats.workers[2].refused == 1


def test_zeno_plus_refreshes_its_direction_every_so_many_pushes() -> None:
    asked: list[int] = []

    def validate(model: torch.nn.Module, number: int) -> Tensor:
        asked.append(number)
        return noisy(model, number)

    server = Server(ZenoPlus(validate, refresh=4), vector(0.0, 0.0))
    for _ in range(10):
        server.push(1, vector(1.0, 0.0))
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("update", "score"), [((-1.0, -2.0), 1.825), ((1.0, 2.0), -3.175), ((-10.0, -20.0), -42.5), ((0.0, 0.0), 0.0)]
)
def test_scores_of_zeno(update: tuple[float, float], score: float) -> None:
    rule = Zeno(distance_to(1.0, 2.0), 1, rate=0.5, rho=0.01)
    Server(rule, vector(0.0, 0.0))
    assert rule.scores(vector(0.0, 0.0), [vector(*update)] * 2) == pytest.approx([score, score])


def test_zeno_drops_the_lowest_scores_of_equal_ones_the_higher_ranks() -> None:
    rows = [[1.0, 2.0], [-1.0, -2.0], [-1.0, -2.0], [0.0, 0.0]]
    moved = after_round(Zeno(distance_to(1.0, 2.0), 3, rate=0.5, rho=0.01), rows)
    assert moved.tolist() == [-0.5, -1.0]
    server = Server(Zeno(distance_to(1.0, 2.0), 3, rate=0.5, rho=0.01), vector(0.0, 0.0), (1, 2, 3, 4))
    round_of(server, list(torch.tensor(rows, dtype=torch.float64)))
    assert [counts.accepted for counts in server.store.stats.workers.values()] == [0, 1, 0, 0]


def test_zeno_that_drops_nothing_is_the_mean() -> None:
    rows = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(after_round(Zeno(distance_to(1.0, 2.0), 0), rows), rows.mean(0))


def test_zeno_survives_a_loss_that_is_not_a_number() -> None:
    def validate(model: torch.nn.Module, number: int) -> Tensor:
        return model.get_parameter("x").sum().sqrt()

    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert after_round(Zeno(validate, 1), rows, vector(0.0, 0.0)).tolist() == [-1.0, -1.0]


ZENO_PS: dict[str, Any] = {"rate": 0.5, "steps": 2}  # so that v is the slope


@pytest.mark.parametrize(
    ("rows", "moved"),
    [
        ([[1.0, 0.0], [0.5, 0.5]], (0.75, 0.25)),
        ([[1.0, 0.0], [-1.0, 0.0]], (1.0, 0.0)),  # the wrong way
        ([[1.0, 0.0], [1.3, 0.0]], (1.0, 0.0)),  # too long
        ([[1.0, 0.0], [0.0, 0.0]], (1.0, 0.0)),  # none
        ([[-1.0, 0.0], [9.0, 0.0]], (0.0, 0.0)),
    ],
)
def test_zeno_ps_takes_the_mean_of_who_goes_the_validators_way(
    rows: list[list[float]], moved: tuple[float, float]
) -> None:
    assert after_round(ZenoPS(slope(1.0, 0.0), **ZENO_PS), rows).tolist() == pytest.approx(moved)


def test_validators_share_the_workers_and_the_sum_is_divided() -> None:
    rule = ZenoPS([slope(1.0, 0.0), slope(0.0, 1.0)], **ZENO_PS)
    rows = [[1.0, 0.0], [1.0, -0.1], [0.5, 0.0], [0.0, 0.5]]  # workers 1 and 3 are the first's
    assert after_round(rule, rows).tolist() == pytest.approx([0.75 / 2, 0.5 / 2])


class Two(torch.nn.Module):
    """Two tensors, of one value each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(vector(0.0))
        self.b = torch.nn.Parameter(vector(0.0))


def two_slopes(model: torch.nn.Module, number: int) -> Tensor:
    return model.get_parameter("a").sum() + model.get_parameter("b").sum()


@pytest.mark.parametrize(("per_tensor", "moved"), [(False, [0.0, 0.0]), (True, [1.0, 0.0])])
def test_judged_by_tensor_a_bad_one_does_not_spoil_the_others(per_tensor: bool, moved: list[float]) -> None:
    rule = ZenoPS(two_slopes, per_tensor=per_tensor, **ZENO_PS)
    server = Server(rule, vector(0.0, 0.0), (1,), model=Two())
    server.push(1, vector(1.0, -1.1))
    assert (-server.model).tolist() == pytest.approx(moved)


@pytest.mark.parametrize(
    ("update", "reverse", "moved"),
    [
        ((0.5, 0.0), False, (0.4, 0.0)),
        ((4.0, 0.0), False, (0.8, 0.0)),  # cut to the validator's length
        ((0.0, 0.5), False, (0.0, 0.4)),  # a right angle passes
        ((-0.5, 0.0), False, (0.0, 0.0)),
        ((-0.5, 0.0), True, (0.4, 0.0)),  # turned round
        ((0.0, 0.0), True, (0.0, 0.0)),
    ],
)
def test_zeno_ps_asynchronous(update: tuple[float, float], reverse: bool, moved: tuple[float, float]) -> None:
    server = Server(ZenoPSAsync(slope(1.0, 0.0), reverse=reverse, **ZENO_PS), vector(0.0, 0.0))
    server.push(1, vector(*update))
    assert (-server.model).tolist() == pytest.approx(moved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plain(rate=0.0), "Plain: rate must be above 0"),
        (lambda: FedAsync(alpha=1.5), "FedAsync: alpha"),
        (lambda: ZenoPlus(noisy, refresh=0), "ZenoPlus: refresh must be at least 1 push"),
        (lambda: Zeno(noisy, -1), "Zeno: drop"),
        (lambda: TrimmedMean(-1), "TrimmedMean: trim"),
        (lambda: Krum(-1), "Krum: hostile"),
        (lambda: MultiKrum(1, 0), "MultiKrum: keep"),
        (lambda: ZenoPS([], rate=0.1), "ZenoPS: validators must be at least one"),
        (lambda: ZenoPSAsync(noisy, rate=0.1, alpha=0.0), "ZenoPSAsync: alpha"),
        (lambda: ZenoPSAsync(noisy, rate=0.1, max_staleness=-1), "ZenoPSAsync: max_staleness"),
        (lambda: ZenoPS(noisy, rate=0.1, rho=-1.0), "ZenoPS: rho"),
        (lambda: Polynomial(-0.5), "Polynomial: exponent"),
        (lambda: Hinge(slope=-1.0), "Hinge: slope"),
        (lambda: Plain(rate=float("inf")), "Plain: rate must be above 0 and finite"),
        (lambda: ZenoPlus(noisy, rate=float("inf")), "ZenoPlus: rate must be above 0 and finite"),
        (lambda: ZenoPSAsync(noisy, rate=0.1, threshold=float("-inf")), "ZenoPSAsync: threshold must be finite"),
        (lambda: Hinge(slope=float("inf")), "Hinge: slope must be at least 0 and finite"),
        (lambda: Zeno("noisy", 1), "Zeno: validate must be a function of a model and a number"),  # type: ignore[arg-type]
        (lambda: ZenoPS(7, rate=0.1), "ZenoPS: validators must be at least one loss"),  # type: ignore[arg-type]
        (lambda: FedAsync(staleness=0.5), "FedAsync: staleness must be a function"),  # type: ignore[arg-type]
        (lambda: Tiers(None), "FedAT: tiers must be at least 1"),  # type: ignore[arg-type]
        (lambda: Tiers([1, 2]), "FedAT: tiers must be at least 1, or the ranks"),  # type: ignore[list-item]
        (lambda: Saga(0.0, "keep"), "ADSAGA: rate must be above 0"),
        (lambda: Server(Krum(2), vector(0.0), WORKERS), "Krum needs at least 7 workers, there are 5"),
        (lambda: Server(TrimmedMean(3), vector(0.0), WORKERS), "TrimmedMean needs at least 7 workers"),
        (lambda: Server(Zeno(noisy, 5), vector(0.0), WORKERS), "Zeno needs at least 6 workers"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("factor", [-0.5, 1.5, float("nan")])
def test_a_factor_that_would_leave_both_models_is_told(factor: float) -> None:
    server = Server(FedAsync(staleness=lambda staleness: factor), vector(0.0))
    with pytest.raises(ConfigurationError, match="staleness must give a factor from 0 to 1, and gave .* for 0"):
        server.push(1, vector(1.0))
    assert float(server.model) == 0.0


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        (lambda model, number: 0.5, "must return a loss, a tensor of one value, and returned 0.5"),
        (lambda model, number: model.get_parameter("x"), r"returned a tensor \(2,\)"),
        (lambda model, number: model.get_parameter("x").detach().sum(), "can be differentiated"),
    ],
    ids=["a number", "losses", "detached"],
)
def test_what_is_no_loss_is_told(validate: Any, message: str) -> None:
    server = Server(ZenoPlus(validate), vector(1.0, 2.0), (1,))
    with pytest.raises(ConfigurationError, match=f"validate .*{message}"):
        server.push(1, vector(3.0, 4.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "make",
    [
        ZenoPlus,
        lambda trusted: ZenoPSAsync(trusted, rate=0.1, reverse=True),
        lambda trusted: ZenoPS(trusted, rate=0.1),
    ],
    ids=["ZenoPlus", "ZenoPSAsync", "ZenoPS"],
)
def test_nothing_passes_where_the_trusted_data_give_no_number(make: Callable[[Any], Rule], value: float) -> None:
    rule = make(lambda model, number: model.get_parameter("x").sum() * value)
    server = Server(rule, vector(1.0, 2.0), (1,))
    assert server.push(1, vector(3.0, 4.0)) == [1]
    assert (server.model.tolist(), server.store.stats.workers[1].refused) == ([1.0, 2.0], 1)
