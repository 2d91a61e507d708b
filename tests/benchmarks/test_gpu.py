"""The benchmark of a GPU runs through on a processor, and goes on after what fails."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import page
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.record import Record
from benchmarks.gpu.steps import SPARSE

GROUPS = ["facts", "steps", "parts", "optimizers", "peers"]


def test_everything_but_the_checks_runs_on_a_processor(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--minutes", "3", "--out", str(out), "--only", *GROUPS]
    assert command.main(arguments) == 0
    rows = json.loads(out.read_text())
    measured = [row for row in rows if row["op"] != "facts" and "missing" not in row]
    assert all(row["seconds"] > 0 and row["passes"] > 0 for row in measured)
    steps = {row["impl"] for row in rows if row["op"] == "step"}
    assert steps == {*SPARSE, "dense"}
    assert {"topk", "backward"} <= {row["op"] for row in rows}
    assert not out.with_suffix(".at").exists()


PLANTED = """
import os, sys, time
from benchmarks.gpu import __main__ as command

def die(bench, d): os._exit(9)
def fail(bench, d): raise ValueError("planted")
def linger(bench, d): time.sleep(600)
def pass_(bench, d): bench.record.append({"op": "passed", "d": d})

todo = [command.Item("facts", each, 5, limit=60) for each in (die, pass_, fail, pass_)]
todo.append(command.Item("facts", linger, 5, limit=0.2))
command.items = lambda *_: todo
if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
"""
"""A program that does these things in place of measuring."""


def test_after_a_process_that_ended_another_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, out = tmp_path / "planted.py", tmp_path / "gpu.json"
    planted.write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(command, "items", command.items)
    monkeypatch.setattr(command, "COMMAND", (sys.executable, str(planted)))
    runpy.run_path(str(planted))
    assert command.main(["--device", "cpu", "--minutes", "4", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())
    assert [row["op"] for row in rows] == ["die", "passed", "fail", "passed", "linger"]
    assert "status 9" in rows[0]["failed"]
    assert "planted" in rows[2]["failed"]
    assert "time was over" in rows[4]["missing"]


def test_a_measurement_that_fails_leaves_a_row(tmp_path: Path) -> None:
    record = Record(tmp_path / "rows.json")
    record.start()
    bench = Bench(torch.device("cpu"), record, seconds=0.001)

    def fail() -> None:
        raise RuntimeError("planted")

    bench.time("step", "broken", 10, fail)
    bench.time("step", "whole", 10, lambda: None)
    first, second = record.rows()
    assert first["failed"] == "RuntimeError: planted"
    assert second["seconds"] > 0


def test_every_group_has_something_to_do() -> None:
    assert {item.group for item in command.items(False, command.GROUPS)} == set(command.GROUPS)
    assert {item.d for item in command.items(False, ["steps"])} == {10**7, 10**8, 10**9}


def test_the_page_is_that_of_the_rows() -> None:
    assert page.PAGE.read_text() == page.page(page.read())
