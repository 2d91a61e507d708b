"""FedAT: its known answers event by event, the mirrored weights, and tiers on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_sketch import Compression, ConfigurationError, FedAT
from hvd_sketch.methods.server.rules.tiers import Tiers
from tests.methods.server.conftest import Together
from tests.methods.server.support import Server, vector

TIERS = [[1, 2], [3, 4], [5, 6]]
CENTRES = {1: 0.0, 2: 1.0, 3: 4.0, 4: 6.0, 5: 10.0, 6: 20.0}
SAMPLES = {1: 1, 2: 3, 3: 2, 4: 2, 5: 4, 6: 1}
ROUND = (1.0, 2.0, 4.5)
PROXIMAL = 0.4
EVENTS = [  # time, tier, its model, rounds, the server's model
    (1.0, 1, 0.535714, (1, 0, 0), 0.0),
    (2.0, 1, 0.535714, (2, 0, 0), 0.0),
    (2.0, 2, 3.571429, (2, 1, 0), 1.190476),
    (3.0, 1, 0.535714, (3, 1, 0), 0.892857),
    (4.0, 1, 0.790816, (4, 1, 0), 0.714286),
    (4.0, 2, 3.911565, (4, 2, 0), 1.303855),
    (4.5, 3, 8.571429, (4, 2, 1), 6.128523),
    (5.0, 1, 0.739796, (5, 2, 1), 6.427509),
]


def tiers_of(tiers: Any = TIERS, **arguments: Any) -> Tiers:
    return Tiers(tiers, **arguments)


def run_round(server: Server, tier: int, at: float) -> None:
    """All workers of a tier answer with their exact proximal solution."""
    for worker in TIERS[tier - 1]:
        begun = server.models[worker]
        arrived = (CENTRES[worker] + PROXIMAL * begun) / (1.0 + PROXIMAL)
        server.push(worker, begun - arrived, at)


def run(server: Server, until: float) -> None:
    """Tiers one after the other as their rounds end; of those that end together the lower first."""
    ends = sorted((ROUND[m] * number, m + 1) for m in range(3) for number in range(1, int(until / ROUND[m]) + 1))
    for at, tier in ends:
        run_round(server, tier, at)


def test_the_first_events_as_published() -> None:
    rule = tiers_of(published=True)
    server = Server(rule, vector(0.0), SAMPLES)
    for at, tier, model, rounds, served in EVENTS:
        run_round(server, tier, at)
        assert float(rule._models[tier - 1]) == pytest.approx(model, abs=5e-7)
        assert tuple(rule.rounds) == rounds
        assert float(server.model) == pytest.approx(served, abs=5e-7)


@pytest.mark.parametrize(("weights", "limit"), [("mirror", 8.52), ("uniform", 5.92)])
def test_where_the_weights_lead_in_the_long_run(weights: Any, limit: float) -> None:
    rule = tiers_of(weights=weights)
    server = Server(rule, vector(0.0), SAMPLES)
    run(server, 900.0)
    assert float(server.model) == pytest.approx(limit, abs=0.01)
    assert [count / sum(rule.rounds) for count in rule.rounds] == pytest.approx([0.58, 0.29, 0.13], abs=0.005)


def test_weighing_by_samples_leads_near_the_minimiser() -> None:
    """The proximal solutions of one round are no minimiser; without the term they would be."""
    server = Server(tiers_of(weights="samples"), vector(0.0), SAMPLES)
    run(server, 900.0)
    minimiser = sum(SAMPLES[k] * CENTRES[k] for k in SAMPLES) / sum(SAMPLES.values())
    assert minimiser == pytest.approx(6.38, abs=0.005)
    assert float(server.model) == pytest.approx(minimiser, abs=0.01)


def test_after_a_tiers_first_round_only_tiers_that_reported_count() -> None:
    server = Server(tiers_of(), vector(0.0), SAMPLES)
    run_round(server, 1, 1.0)
    assert float(server.model) == pytest.approx(0.535714, abs=5e-7)
    run_round(server, 3, 2.0)
    assert float(server.model) == pytest.approx((0.535714 + 8.571429) / 2, abs=5e-7)


@pytest.mark.parametrize(
    ("rounds", "weights"),
    [((10, 6, 3, 2, 1), (0.0455, 0.0909, 0.1364, 0.2727, 0.4545)), ((4, 2, 2), (0.25, 0.25, 0.5)), ((7,), (1.0,))],
)
@pytest.mark.parametrize("published", [True, False])
def test_known_weights(rounds: tuple[int, ...], weights: tuple[float, ...], published: bool) -> None:
    rule = tiers_of(len(rounds), published=published)
    Server(rule, vector(0.0), dict.fromkeys(range(1, 6), 1))
    rule.rounds = list(rounds)
    assert rule.weights() == pytest.approx(weights, abs=5e-5)


def test_one_tier_is_fedavg() -> None:
    server = Server(tiers_of([[1, 2]]), vector(0.0), {1: 1, 2: 3})
    assert server.push(1, vector(-4.0)) == []
    assert server.push(2, vector(-8.0)) == [1, 2]
    assert float(server.model) == 7.0


def test_tiers_follow_the_first_latencies_and_their_pushes_count() -> None:
    rule = tiers_of(2)
    server = Server(rule, vector(0.0), dict.fromkeys((1, 2, 3, 4), 1))
    assert [server.push(worker, vector(-1.0), at) for worker, at in ((3, 1.0), (1, 2.0), (4, 3.0))] == [[]] * 3
    assert server.push(2, vector(-3.0), 9.0) == [1, 3, 2, 4]
    assert rule.tier_of == {3: 0, 1: 0, 4: 1, 2: 1}
    assert rule.rounds == [1, 1]
    assert float(server.model) == 1.5


def test_workers_change_tiers_as_their_latencies_do() -> None:
    rule = tiers_of([[1, 2], [3, 4]], retier=2)
    server, now = Server(rule, vector(0.0), dict.fromkeys((1, 2, 3, 4), 1)), 0.0
    for _ in range(12):
        for worker, seconds in ((3, 0.1), (4, 0.1), (1, 0.1), (2, 10.0)):  # worker 2 was fast once
            if worker in server.versions:
                now += seconds
                server.push(worker, vector(0.0), now)
    assert rule.tier_of[2] == 1
    assert sorted(rule.tier_of.values()) == [0, 0, 1, 1]


def test_who_changes_tiers_is_asked_again_where_nobody_else_is() -> None:
    """Two tiers of one worker each change places: both workers go on, and neither waits for ever."""
    rule = tiers_of([[1], [2]], retier=2)
    server = Server(rule, vector(0.0), {1: 1, 2: 1})
    seconds = {1: iter([1.0, *[50.0] * 99]), 2: iter([10.0, *[1.0] * 999])}
    due = {worker: next(seconds[worker]) for worker in (1, 2)}
    for _ in range(400):
        worker = min(due, key=lambda worker: due[worker])
        now = due.pop(worker)
        due |= {asked: now + next(seconds[asked]) for asked in server.push(worker, vector(0.0), now)}
    assert rule.tier_of == {1: 1, 2: 0}
    assert sorted(due) == [1, 2]


def test_a_round_asks_some_and_the_others_rest() -> None:
    rule = tiers_of([[1, 2, 3, 4]], clients=2)
    server = Server(rule, vector(0.0), dict.fromkeys((1, 2, 3, 4), 1))
    asked: list[int] = []
    for worker in (1, 2, 3, 4):
        asked = server.push(worker, vector(0.0))
    seen = set(asked)
    for _ in range(20):
        assert len(asked) == 2
        first, second = asked
        assert server.push(first, vector(0.0)) == []
        asked = server.push(second, vector(0.0))
        seen |= set(asked)
    assert seen == {1, 2, 3, 4}


def test_who_is_lost_is_not_waited_for_and_counts_again_when_it_returns() -> None:
    rule = tiers_of([[1, 2], [3]])
    server = Server(rule, vector(0.0), dict.fromkeys((1, 2, 3), 1))
    server.push(1, vector(-1.0))
    assert server.take(server.store.leave(2, True, 1.0)) == [1]
    assert server.push(1, vector(0.0)) == [1]
    assert server.push(2, vector(-5.0)) == []  # late: in the round that 1 works for
    assert server.push(1, vector(0.0)) == [1, 2]
    assert rule.rounds == [3, 0]


def test_a_round_of_which_all_are_lost_is_void_and_others_are_asked() -> None:
    rule = tiers_of([[1, 2]], clients=1)
    server = Server(rule, vector(0.0), {1: 1, 2: 1})
    server.push(1, vector(0.0))
    (asked,) = server.push(2, vector(0.0))
    other = 3 - asked
    assert server.take(server.store.leave(asked, True, 3.0)) == [other]
    assert rule.rounds == [1]


def test_a_tier_that_nobody_is_left_of_keeps_its_weight_for_a_while() -> None:
    rule = tiers_of([[1], [2]], forget=3)
    server = Server(rule, vector(0.0), {1: 1, 2: 1})
    server.push(1, vector(-1.0))
    server.push(2, vector(-9.0))
    server.take(server.store.leave(2, True, 3.0))
    weights = []
    for _ in range(5):
        server.push(1, server.models[1] - 1.0)
        weights.append(rule.weights()[1])
    assert weights == pytest.approx([2 / 3, 3 / 4, 4 / 5, 0.0, 0.0])
    assert float(server.model) == pytest.approx(1.0)


@pytest.mark.parametrize("tiers", [TIERS, 3], ids=["given", "profiled"])
def test_saved_tiers_go_on_alike(tiers: Any) -> None:
    servers = [Server(tiers_of(tiers, clients=1, retier=4), vector(0.0), SAMPLES) for _ in range(2)]
    train(servers[0], 30)
    state = servers[0].store.state_dict()
    for server in servers:
        server.store.load_state_dict(state)  # where it comes from too, for all workers are asked anew
        for worker in SAMPLES:
            server.take(server.store.join(worker, 0, True, 100.0))
        train(server, 30, 100.0)
    assert float(servers[0].model) == float(servers[1].model) != 0.0
    assert servers[0].store.version == servers[1].store.version


def train(server: Server, pushes: int, start: float = 0.0) -> None:
    """Whoever was asked answers, the workers in turn, each with the exact proximal solution."""
    for number in range(pushes):
        worker = sorted(server.versions)[number % len(server.versions)]
        begun = server.models[worker]
        arrived = (CENTRES[worker] + PROXIMAL * begun) / (1.0 + PROXIMAL)
        server.push(worker, begun - arrived, start + number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tiers": 0}, "tiers must be at least 1"),
        ({"tiers": 7}, "tiers must be at most the 6 workers"),
        ({"tiers": [[1, 2], [3, 4]]}, "tiers must be a partition of"),
        ({"clients": 0}, "clients must be"),
        ({"weights": "equal"}, "weights must be mirror, uniform or samples"),
        ({"weights": "uniform", "published": True}, "published must be False unless"),
        ({"retier": 0}, "retier must be"),
        ({"forget": 0}, "forget must be"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"FedAT: {message}"):
        Server(tiers_of(**arguments), vector(0.0), SAMPLES)


def test_a_code_that_is_none_is_refused_by_its_name() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(vector(0.0))], 0.1)
    for code in ("polyline", Compression.fp16):
        with pytest.raises(ConfigurationError, match="FedAT: code must be a Polyline, or Compression.none"):
            FedAT(sgd, torch.nn.Linear(1, 1), period=1, code=code)
    with pytest.raises(TypeError, match="period"):
        FedAT(sgd, torch.nn.Linear(1, 1))  # type: ignore[call-arg]


def test_tiers_train_on_real_ranks(together: Together) -> None:
    server, *workers = [rank.tiers for rank in together.ranks]
    assert server.tiers == {1: 0, 2: 1, 3: 0, 4: 1}
    assert server.rounds[0] > server.rounds[1] > 1
    assert torch.all((server.model > 1.0) & (server.model < 4.0))
    for worker in workers:
        assert worker.pushes >= 1
        assert worker.bytes_sent < worker.pushes * (16 + 4 * 100) / 1.5  # polyline, differences
