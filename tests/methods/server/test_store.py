"""The server's model without messages: versions, staleness, what workers may not say, differences, and replay."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.methods.server import replay
from hvd_sketch.methods.server.codes import Code
from hvd_sketch.methods.server.log import Happened, Log, read_log
from hvd_sketch.methods.server.message import Header, Kind
from hvd_sketch.methods.server.polyline import Polyline, PolylineCode
from hvd_sketch.methods.server.rules import FedAsync, Mean, Plain, Rule
from hvd_sketch.methods.server.sparse_codes import sparse_code
from hvd_sketch.methods.server.store import ProtocolError, Store
from hvd_sketch.saved import differences
from tests.methods.server.support import Server, Vector, served, vector

COUNT = 400


def topk() -> Code:
    compression = Compression.topk(ratio=8.0, warmup_steps=0, dense_below=0)
    return sparse_code(compression, compression.layout([("x", torch.zeros(COUNT))]))


def random_server(rule: Rule, *, up: Code | None, down: Code | None, pushes: int, **others: Any) -> Server:
    """Three workers push random updates in a random order; a synchronous rule lets nobody push twice in a round."""
    order, generator = random.Random(3), torch.Generator().manual_seed(3)
    server = Server(rule, torch.randn(COUNT, generator=generator), (1, 2, 5), up=up, down=down, **others)
    for _ in range(pushes):
        worker = order.choice(sorted(server.versions))
        server.push(worker, torch.randn(COUNT, generator=generator))
    return server


def test_versions_count_changes_and_staleness_the_changes_in_between() -> None:
    server = Server(Plain(), vector(0.0), (1, 2, 3))
    for worker in (1, 2, 3, 1, 1, 2):
        server.push(worker, vector(1.0))
    assert (server.store.version, float(server.model)) == (6, -6.0)
    assert server.versions == {1: 5, 2: 6, 3: 3}
    stats = server.store.stats
    assert stats.largest_staleness == 3
    assert stats.mean_staleness == pytest.approx((0 + 1 + 2 + 2 + 0 + 3) / 6)
    assert {worker: counts.accepted for worker, counts in stats.workers.items()} == {1: 3, 2: 2, 3: 1}


def test_the_first_push_of_each_of_m_workers_is_at_most_m_minus_1_stale() -> None:
    server = Server(Plain(), vector(0.0), range(1, 9))
    for worker in range(1, 9):
        server.push(worker, vector(1.0))
    assert server.store.stats.largest_staleness == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_applied_but_answered(value: float) -> None:
    server = Server(Plain(), vector(1.0, 2.0))
    assert server.push(1, vector(0.0, value)) == [1]
    assert server.model.tolist() == [1.0, 2.0]
    assert server.store.version == 0
    assert server.store.stats.workers[1].void == 1


def test_a_damaged_message_is_not_applied_but_answered() -> None:
    server = Server(Plain(), vector(1.0))
    replies = server.store.push(1, Header(Kind.PUSH, 0), vector(1.0).view(torch.uint8), False, 0.0)
    assert server.take(replies) == [1]
    assert (float(server.model), server.store.stats.workers[1].void) == (1.0, 1)


@pytest.mark.parametrize(
    ("header", "nbytes", "message"),
    [
        (Header(Kind.PUSH, 0), 7, "7 bytes, the whole vector has 8"),
        (Header(Kind.PUSH, 1), 8, "says version 1, it was sent 0"),
        (Header(Kind.PUSH, 2**63), 8, "it was sent 0"),
        (Header(Kind.PUSH, 0, code=2), 8, "code 2 was not agreed on"),
    ],
)
def test_what_cannot_be_right_changes_nothing(header: Header, nbytes: int, message: str) -> None:
    server = Server(Plain(), vector(1.0))
    with pytest.raises(ProtocolError, match=message):
        server.store.push(1, header, torch.zeros(nbytes, dtype=torch.uint8), True, 0.0)
    assert (float(server.model), server.store.version) == (1.0, 0)
    assert server.push(1, vector(1.0)) == [1]


def test_strangers_and_pushes_too_many_are_refused() -> None:
    server, zero = Server(Mean(), vector(1.0)), vector(0.0).view(torch.uint8)
    with pytest.raises(ProtocolError, match=r"none of the workers, which are \[1, 2\]"):
        server.store.push(3, Header(Kind.PUSH), zero, True, 0.0)
    server.push(1, vector(1.0))
    with pytest.raises(ProtocolError, match="without having been sent a model"):
        server.store.push(1, Header(Kind.PUSH), zero, True, 0.0)


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 4), st.booleans())
def test_no_bytes_of_a_worker_do_harm(content: bytes, number: int, code: int, intact: bool) -> None:
    server = Server(Plain(), torch.zeros(COUNT), up=topk())
    payload = torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)
    try:
        server.store.push(1, Header(Kind.PUSH, number, code), payload, intact, 0.0)
    except ProtocolError:
        assert server.store.version == 0
    assert server.model.isfinite().all()


@pytest.mark.parametrize("down", [None, topk(), PolylineCode(Polyline(3), COUNT)], ids=["whole", "topk", "polyline"])
def test_the_server_knows_to_the_bit_what_every_worker_has(down: Code | None) -> None:
    server = random_server(FedAsync(), up=topk(), down=down, pushes=60)
    for worker, model in server.models.items():
        assert torch.equal(model, server.store._shown[worker])


def test_differences_bring_the_whole_model_in_time() -> None:
    server = random_server(Plain(), up=topk(), down=topk(), pushes=30)
    assert not torch.equal(server.models[1], server.model)
    for _ in range(30):
        server.push(1, torch.zeros(COUNT))
    torch.testing.assert_close(server.models[1], server.model, rtol=0, atol=1e-5)


def test_a_lost_worker_comes_back_with_what_it_had_under_way() -> None:
    server = Server(Plain(), vector(0.0), (1, 2))
    server.store.leave(1, True, 0.0)
    server.push(2, vector(1.0))
    assert server.push(1, vector(1.0)) == [1]
    assert float(server.model) == -2.0
    assert (server.store.stats.workers[1].lost, server.store.stats.largest_staleness) == (1, 1)


def test_a_round_ends_without_who_is_lost() -> None:
    server = Server(Mean(), vector(0.0), (1, 2, 3))
    assert server.push(1, vector(1.0)) == []
    assert server.push(2, vector(3.0)) == []
    assert server.take(server.store.leave(3, True, 0.0)) == [1, 2]
    assert float(server.model) == -2.0


@pytest.mark.parametrize("down", [None, topk()], ids=["whole", "differences"])
@pytest.mark.parametrize("rule", [Plain, FedAsync, Mean])
def test_a_replayed_log_gives_the_same_model_to_the_bit(
    tmp_path: Path, rule: Callable[[], Rule], down: Code | None
) -> None:
    recorded = random_server(rule(), up=topk(), down=down, pushes=50, log=Log(tmp_path / "log"))
    recorded.take(recorded.store.leave(5, True, 99.0))
    again = Store(
        torch.zeros(COUNT), rule(), served(Vector(torch.zeros(COUNT)), {1: 1, 2: 1, 5: 1}), up=topk(), down=down
    )
    for event in read_log(tmp_path / "log"):
        again.repeat(event)
    assert torch.equal(again.model, recorded.model)
    assert again.version == recorded.store.version > 10
    assert again.stats == recorded.store.stats


def test_a_log_that_was_cut_off_ends_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    server = Server(Plain(), vector(0.0), log=Log(path))
    for _ in range(3):
        server.push(1, vector(1.0))
    whole_log = path.read_bytes()
    for cut in (1, 9):
        path.write_bytes(whole_log[:-cut])
        assert [event.what for event in read_log(path)] == [
            Happened.START,
            *[Happened.JOIN] * 2,
            *[Happened.PUSH] * 2,
        ]


def test_what_is_no_log_is_told(tmp_path: Path) -> None:
    """And its bytes are not taken for a length, for which there is no memory."""
    (tmp_path / "text").write_bytes(b"what somebody wrote down about a run, and no log of one")
    with pytest.raises(ConfigurationError, match="is no log of a server; give what log= named"):
        list(read_log(tmp_path / "text"))
    with pytest.raises(ConfigurationError, match="path must be that of a file, got 5"):
        list(read_log(5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": {1: 1, 2: 1}}, "of worker 5, it is none of the workers.*the ranks of samples as recorded"),
        ({"samples": 3}, "samples must have a number of at least 1 for the rank of each worker, got 3"),
        ({"samples": {1: 0}}, "samples must have a number of at least 1"),
        ({"up": Compression.none}, "code 1 was not agreed on; give up, down and the ranks"),
        (
            {"model": Vector(torch.zeros(COUNT + 1))},
            "model has 1604 bytes of parameters that train, and that of .* 1600",
        ),
        ({"rule": Mean}, "rule must be one of hvd_sketch.methods.server, such as Mean"),
        ({"state": {}}, "state: .*has no"),
    ],
    ids=str,
)
def test_a_replay_of_other_settings_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_server(Plain(), up=topk(), down=None, pushes=20, log=Log(tmp_path / "log"))
    recorded = {
        "model": Vector(torch.zeros(COUNT)),
        "rule": Plain(),
        "samples": {1: 1, 2: 1, 5: 1},
        "up": Compression.topk(ratio=8.0, warmup_steps=0, dense_below=0),
    }
    with pytest.raises(ConfigurationError, match=f"(?s)^replay: .*{message}"):
        replay(tmp_path / "log", **{**recorded, **change})


def test_a_saved_server_goes_on_alike() -> None:
    servers = [random_server(Plain(), up=topk(), down=None, pushes=20) for _ in range(2)]
    resumed = Server(Plain(), torch.zeros(COUNT), (1, 2, 5), up=topk())
    resumed.store.load_state_dict(servers[0].store.state_dict())
    for worker in (1, 2, 5):
        resumed.take(resumed.store.join(worker, 0, True, 0.0))
        servers[1].take(servers[1].store.join(worker, 0, True, 0.0))
    for step in range(6):
        for server in (resumed, servers[1]):
            server.push((1, 2, 5)[step % 3], torch.full((COUNT,), float(step)))
    assert torch.equal(resumed.model, servers[1].model)
    assert resumed.store.version == servers[1].store.version


def test_a_saved_server_of_other_workers_is_refused() -> None:
    state = Server(Plain(), vector(0.0), (1, 2)).store.state_dict()
    form = Server(Plain(), vector(0.0), (1, 2, 3)).store.state_form()
    assert list(differences(state, form)) == ["workers has no 3"]


def test_fuzzing_covers_what_is_read() -> None:
    """The codes above are understood, or fuzzing them would test nothing."""
    server = Server(Plain(), torch.zeros(COUNT), up=topk())
    update: Tensor = torch.ones(COUNT)
    assert server.push(1, update) == [1]
    assert server.store.version == 1


def test_who_is_done_has_no_push_left() -> None:
    """Or a round would wait for one that said it was done."""
    server = Server(Mean(), vector(0.0), (1, 2))
    server.store.leave(2, False, 0.0)
    with pytest.raises(ProtocolError, match="without having been sent a model"):
        server.push(2, vector(1.0))
    assert server.push(1, vector(1.0)) == [1]


@pytest.mark.parametrize("value", [1e20, -3e38])
def test_values_whose_squares_are_infinite_are_never_applied(value: float) -> None:
    """They could make the model infinite, and the lengths and angles that rules judge by."""
    server = Server(Plain(), torch.zeros(2))
    assert server.push(1, torch.tensor([0.0, value])) == [1]
    assert (server.model.tolist(), server.store.stats.workers[1].void) == ([0.0, 0.0], 1)


def test_the_log_of_a_resumed_server_is_replayed_from_what_it_had_loaded(tmp_path: Path) -> None:
    before = random_server(FedAsync(), up=None, down=None, pushes=20)
    state = before.store.state_dict()
    model = Vector(torch.zeros(COUNT))
    resumed = Store(
        torch.zeros(COUNT),
        Plain(),
        served(model, dict.fromkeys((1, 2, 5), 1)),
        up=topk(),
        down=None,
        log=Log(tmp_path / "log"),
    )
    resumed.load_state_dict(state)
    resumed.begin()
    resumed.join(2, 0, True, 0.0)
    resumed.push(2, Header(Kind.PUSH, resumed.version), torch.ones(COUNT).view(torch.uint8), True, 1.0)
    again = replay(tmp_path / "log", model, Plain(), dict.fromkeys((1, 2, 5), 1), state)
    assert again.version == resumed.version == 21
    assert torch.equal(again.model, resumed.model)
    assert again.stats.workers == resumed.stats.workers
