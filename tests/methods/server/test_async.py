"""AsyncSGD on real ranks: nothing is lost, nobody waits, a real run is replayed to the bit, and what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hvd_sketch.methods.server import (
    FedAsync,
    Plain,
    Rule,
    replay,
)
from tests.methods.server.asynchronous import COUNT, VARIANTS, WORKERS, OnMpi, Trained
from tests.methods.server.conftest import Together
from tests.methods.server.support import Vector


class Results(NamedTuple):
    ranks: list[OnMpi]
    logs: Path

    def of(self, name: str) -> list[Trained]:
        return [result.trained[name] for result in self.ranks]


@pytest.fixture(scope="module")
def results(together: Together) -> Results:
    return Results([rank.asynchronous for rank in together.ranks if rank.asynchronous is not None], together.folder)


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
        assert len(result.refusals) == 6
        assert result.refusals[:4] == results.ranks[0].refusals[:4]
        assert "rule must be one of hvd_sketch.methods.server" in result.refusals[4]
        assert "No such file" in result.refusals[5]
    assert "server: rank 0 has 'server=0', rank 1 has 'server=1'" in results.ranks[0].refusals[0]
    assert "ratio=8.0" in results.ranks[0].refusals[1]
    assert "server must be a rank below 4, got 4" in results.ranks[0].refusals[2]
    assert "Krum needs at least 5 workers, there are 3" in results.ranks[0].refusals[3]


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


def test_all_begin_with_what_the_server_has_when_its_block_begins(results: Results) -> None:
    assert [(result.begun.frozen, result.begun.seen) for result in results.ranks] == [(10.0, 7.0)] * 4
    told, *others = (result.begun.warned for result in results.ranks)
    assert ["trains nothing, so the running statistics of its 'norm' stay what they are" in text for text in told] == [
        True
    ]
    assert others == [[]] * 3


def test_what_a_server_that_works_saves_is_its_own_work(results: Results) -> None:
    """Or what others did after its last step would be pushed again when it goes on."""
    assert all(result.saved for result in results.ranks)


def test_a_dedicated_server_serves_one_block_at_a_time(results: Results) -> None:
    server, *workers = (result.nested for result in results.ranks)
    assert "rank 0 is the server of another block, which has not ended" in server
    assert all("the server, rank 0, has ended by an error" in told for told in workers)
