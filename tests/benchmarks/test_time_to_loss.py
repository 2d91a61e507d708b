"""Time to dense training's loss: real trainings on a small cluster, and what their rows say."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cluster import missing, take_down
from benchmarks.time_to_loss import report, rows
from benchmarks.time_to_loss.rows import Cell, Effort
from benchmarks.time_to_loss.tasks import GOALS

NAME = f"loss{os.getpid()}"
CURVE = [[10, 1.0, 100.0, 3.0], [20, 2.0, 200.0, 2.0], [30, 3.0, 300.0, 2.5]]


def test_dense_training_sets_its_lowest_loss_as_the_goal() -> None:
    row = rows.trained(CURVE, None)
    assert (row["target"], row["steps"], row["seconds_to_loss"], row["bytes_per_rank"]) == (2.0, 20, 2.0, 200.0)


def test_the_first_moment_at_the_goal_counts_and_none_is_no_time() -> None:
    assert rows.trained(CURVE, 2.6)["steps"] == 20
    never = rows.trained(CURVE, 1.0)
    assert never["seconds_to_loss"] is None
    assert (never["steps"], never["loss"]) == (30, 2.5)


def test_dense_comes_first_of_every_cell() -> None:
    cells = rows.grid((2,), (100.0,), ("cnn-1M", "cnn-10M"), ("ddp", "horovod", "auto-40"), (0, 1))
    assert [cell.method for cell in cells] == ["horovod", "ddp", "auto-40"] * 4


@pytest.mark.parametrize("model", sorted(GOALS))
def test_models_have_the_size_that_their_name_says(model: str) -> None:
    size = sum(parameter.numel() for parameter in GOALS[model].task.model().parameters())
    assert size / 1e6 == pytest.approx(float(model.split("-")[1].removesuffix("M")), rel=0.15)


@pytest.mark.skipif(bool(missing()), reason="; ".join(missing()) or "nothing is missing")
@pytest.mark.timeout(300)
def test_trainings_on_a_cluster_and_steps_composed_with_another_links_seconds(tmp_path: Path) -> None:
    cells = rows.grid((2,), (1000.0,), ("transformer-0.3M",), ("horovod", "auto-40", "ddp-auto-40"), (0,))
    file, effort = tmp_path / "rows.json", Effort(limit=90.0, steps=10, interval=5)
    try:
        rows.measure(cells, file, NAME, effort)
        slow = replace(cells[1], mbit=100.0)
        rows.measure([slow], file, NAME, replace(effort, compose=True))
    finally:
        take_down(NAME)
    found = rows.read(file)
    dense, ours, hooked = (found[cell] for cell in cells)
    assert not [row["error"] for row in found.values() if "error" in row]
    assert dense["loss"] == dense["target"] == ours["target"]
    assert dense["bytes_per_rank"] / dense["steps"] > 10 * ours["bytes_per_rank"] / ours["steps"]
    assert [moment[0] for moment in ours["curve"]][:2] == [5, 10]
    assert hooked["loss"] == pytest.approx(ours["loss"], rel=1e-3), "the same exchange by another door"
    assert found[slow]["steps"] == ours["steps"]
    assert found[slow]["composed"]
    report.write(found, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "## 2 hosts, 1000 Mbit/s, transformer-0.3M" in text
    before = file.stat().st_mtime_ns
    rows.measure([*cells, slow], file, NAME, effort)
    assert file.stat().st_mtime_ns == before


def test_a_method_without_dense_training_has_nothing_to_reach(tmp_path: Path) -> None:
    failed = {Cell(2, 100.0, "cnn-1M", "ddp", 0): {"error": "dense training has no loss to reach"}}
    report.write(failed, tmp_path / "page.md")
    assert "no loss to reach" in (tmp_path / "page.md").read_text()
