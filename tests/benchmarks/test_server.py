"""The benchmarks of training with a server: they run, and the page says what the rows say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.server import attacks, classes, report, rows, straggler


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
