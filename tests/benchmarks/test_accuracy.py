"""The accuracy benchmark: real ranks give the numbers of the simulated ones, and rows are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import hosts
from benchmarks.accuracy.against import settle_dense
from benchmarks.accuracy.methods import BY_RATIO, make, suits, way_of
from benchmarks.accuracy.report import write_page
from benchmarks.accuracy.simulate import train
from benchmarks.accuracy.tasks import TASKS
from tests.support.ranks import launch, python

TASK, STEPS = "cnn-batchnorm", 12


@pytest.mark.parametrize("method", ["sharded, anticipate", "sketch", "local SGD"])
def test_real_ranks_give_the_numbers_of_the_simulation(method: str) -> None:
    simulated = train(TASKS[TASK], make(method, 20.0), ranks=2, seed=0, steps=STEPS)
    arguments = ["-m", "benchmarks.accuracy.ranks", TASK, method, "20", "--steps", str(STEPS)]
    completed = launch(2, python(*arguments))
    assert completed.returncode == 0, completed.output
    lines = [line.split(">:")[-1].split() for line in completed.output.splitlines() if " steps " in line]
    assert len(lines) == len(simulated.losses) == 12
    for line, (step, sent, loss) in zip(lines, simulated.losses, strict=True):
        assert int(line[0]) == step
        assert float(line[2]) == pytest.approx(sent / 1e6, abs=6e-4)
        assert float(line[-1]) == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_every_method_trains_on_every_task_that_it_suits() -> None:
    for task in TASKS.values():
        for method in (each for each in ("dense", *BY_RATIO) if suits(each, task.name)):
            outcome = train(task, make(method, 20.0), ranks=2, seed=0, steps=2)
            assert [step for step, _, _ in outcome.losses] == [1, 2]
            assert not outcome.diverged, (task.name, method)


def test_rows_are_kept_and_a_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "accuracy.json")
    rows: list[dict[str, Any]] = []
    for method, setting in (("dense", 1.0), ("sharded", 20.0), ("sketch", 400.0)):
        rows.append(command._row((TASK, method, setting, 2, 0, 3, 1.0), rows))
        command._append(rows[-1])
    assert json.loads((tmp_path / "accuracy.json").read_text()) == json.loads(json.dumps(rows))
    assert rows[1]["ratio"] == pytest.approx(20.0, rel=0.05)
    assert "refused" in rows[2]
    write_page(rows, tmp_path)
    page = (tmp_path / "accuracy.md").read_text()
    assert "| sharded | 20 | " in page
    assert (tmp_path / f"accuracy-{TASK}-3.png").exists()


def test_by_hand_is_compared_with_dense_at_its_best_rate(tmp_path: Path) -> None:
    plain = {"task": TASK, "ranks": 2, "steps": 3, "diverged": False, "ratio": 1.0, "bytes_per_parameter": 1.0}

    def row(method: str, seed: int, scale: float, loss: float) -> dict[str, Any]:
        key = {"method": method, "setting": 1.0 if method == "dense" else 40.0, "seed": seed, "lr_scale": scale}
        return {**plain, **key, "way": way_of(method), "final_loss": loss, "losses": [(3, 10, loss)]}

    rows = [row("dense", seed, scale, 4.0 / scale + seed) for seed in (0, 1) for scale in (1.0, 2.0)]
    rows.append(row("dense", 0, 4.0, 0.5))  # with one seed alone it does not count
    rows += [row("auto, dropped in", 1, 1.0, 6.0), row("sharded", 1, 1.0, 6.0), row("sharded", 1, 2.0, 3.3)]
    settle_dense(rows)
    assert [each["dense_loss"] for each in rows] == [2.0, 2.0, 3.0, 3.0, 2.0, 5.0, 3.0, 3.0]
    write_page(rows, tmp_path)
    page = (tmp_path / "accuracy.md").read_text()
    assert "Ratio 40, from the best: auto, dropped in (+20.0 %)." in page
    assert "Ratio 40, from the best: sharded, lr 2 (+10.0 %)." in page


def test_hosts_of_simulated_ranks_are_compared_with_dense() -> None:
    rows = [hosts.Run(ranks=4, local=local, batch=1, seed=0, steps=2, ratio=20.0).row() for local in (0, 2)]
    gap = 100 * (rows[1]["final_loss"] / rows[0]["final_loss"] - 1)
    assert rows[0]["losses"][0][1] == pytest.approx(rows[1]["losses"][0][1], rel=0.05)
    assert f"| 4 | 1 | 2 | 2, of hosts of 2 | 20 | {rows[1]['final_loss']:.3f} | {gap:.1f} (mean {gap:.1f}) |" in (
        hosts.table(rows)
    )
