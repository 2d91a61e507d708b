"""The benchmarks of training with a server: they run, and the page says what the rows say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from benchmarks.server import attacks, classes, faults, report, rows, straggler
from hvd_sketch.methods.server.log import Event, Happened
from tests.support.ranks import ranks


def test_the_page_is_made_of_the_rows(tmp_path: Path) -> None:
    page = tmp_path / "server.md"
    report.write(rows.read(), page)
    assert page.read_text() == report.PAGE.read_text()


@pytest.mark.parametrize("attack", attacks.ATTACKS)
def test_a_cell_of_the_attack_table(monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    monkeypatch.setattr(attacks, "PUSHES", 3)
    row = attacks.run({"rule": "Krum", "attack": attack, "hostile": 3, "seed": 0})
    assert row["refused"] == pytest.approx(6 / 7 if row["missed"] == 0 else 1.0, abs=0.15)
    assert 0.0 <= row["accuracy"] <= 1.0


@pytest.mark.parametrize("method", straggler.METHODS)
def test_a_cell_of_the_straggler_experiment(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(straggler, "HORIZON", 80.0)
    row = straggler.run({"method": method, "factor": 5.0, "seed": 0}, 0.2)
    assert len(row["losses"]) == straggler.MOMENTS
    assert row["losses"][-1] < row["losses"][0] < math.inf
    assert row["megabytes"] > 0.0


def test_a_cell_of_the_classes_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straggler, "HORIZON", 20.0)
    row = classes.run({"method": "FedAT, samples", "seed": 0})
    assert row.keys() == {"rare", "common"}


def test_what_a_log_tells_of_a_fault() -> None:
    """Workers 2 and 3 push every half second, worker 1 until it is lost and again at the end; then 3 stops as well."""
    moments = [moment / 2 for moment in range(100)]
    pushes = [(2, moment) for moment in moments] + [(3, moment) for moment in moments if moment < 40.0]
    pushes += [(1, moment) for moment in moments if not 20.0 < moment < 49.0]
    events = [Event(Happened.PUSH, worker, at=at) for worker, at in pushes] + [Event(Happened.LOST, 1, at=26.0)]
    row = faults.seen(sorted(events, key=lambda event: event.at), 20.25)
    assert (row["before"], row["since"]) == (4.0, round((59 + 39) / 30, 2))
    assert (row["longest_before"], row["longest_since"]) == (0.5, 10.75)
    assert (row["lost"], row["back"]) == (5.75, 28.75)


def on_4_ranks(results: str) -> None:
    """Three workers, of which one is hostile or slow, for a moment; twice, of which the second has nothing to do."""
    from benchmarks.server import on_ranks

    attacks.WORKERS, attacks.PUSHES = 3, 2
    attacks.ATTACKS, attacks.HOSTILE = ("label flip", "ALIE"), (1,)
    attacks.RULES = {name: attacks.RULES[name] for name in ("Zeno++", "mean")}
    classes.TIERS = [[1, 2], [0]]
    straggler.WORKERS, on_ranks.UNIT = 3, 0.001
    on_ranks.METHODS = {name: on_ranks.fedat(weights=name) for name in ("mirror", "samples")}
    sys.argv = ["on_ranks", "--seeds", "0", "--results", results]
    on_ranks.main()
    on_ranks.main()


def test_hostile_workers_and_rare_classes_on_real_ranks(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    ranks(4, on_4_ranks, str(results))
    hostile, different = rows.read(results)[:4], rows.read(results)[4:]
    assert [(row["rule"], row["attack"]) for row in hostile] == [
        (rule, attack) for attack in ("label flip", "ALIE") for rule in ("Zeno++", "mean")
    ]
    assert [(row["refused"], row["missed"]) for row in hostile if row["rule"] == "mean"] == [(0.0, 1.0)] * 2
    assert [row["method"] for row in different] == ["mirror", "samples"]
    assert all(0.0 < row[name] <= 1.0 for row, name in ((hostile[0], "accuracy"), (different[1], "common")))
