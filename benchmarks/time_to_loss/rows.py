"""The rows: which there are, where they are kept, and how one that is missing comes about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.cluster.bench import ENVIRONMENT, reason
from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.launchers import LAUNCHERS
from benchmarks.cluster.machine import describe
from benchmarks.time_to_loss.methods import METHODS, PERIOD
from benchmarks.time_to_loss.tasks import GOALS

RESULTS = Path(__file__).resolve().parent.parent / "results" / "time_to_loss.json"
DENSE = "horovod"
"""What sets the goal."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One row before it is measured."""

    hosts: int
    mbit: float
    model: str
    method: str
    seed: int


@dataclass(frozen=True)
class Effort:
    """How much is done for a row.

    Attributes:
        limit: seconds after which a run is given up.
        compose: where the same training was done on other links, take its steps, and measure only what a step takes
            here: the same numbers travel, so the same steps are taken. Otherwise every row is a training of its own.
        steps, interval: of dense training and between evaluations, in place of the model's own, where not 0.
    """

    limit: float = 3600.0
    compose: bool = False
    steps: int = 0
    interval: int = 0


def grid(
    hosts: Sequence[int], rates: Sequence[float], models: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of these columns, dense first, because it sets the others' goal."""
    ordered = sorted(methods, key=lambda method: (method != DENSE, list(METHODS).index(method)))
    return [
        Cell(count, mbit, model, method, seed)
        for count, mbit, model, seed, method in product(hosts, rates, models, seeds, ordered)
    ]


def read(path: Path = RESULTS) -> dict[Cell, Row]:
    """The rows measured so far."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    columns = tuple(Cell.__dataclass_fields__)
    return {Cell(*(row[column] for column in columns)): row for row in rows}


def measure(cells: Iterable[Cell], path: Path, name: str, effort: Effort) -> None:
    """Add a row to the file for each cell that has none; what was interrupted goes on where it was.

    Raises:
        ClusterError: when the cluster cannot be brought up.
    """
    rows = read(path)
    todo = [cell for cell in cells if cell not in rows]
    for (hosts, mbit), group in groupby(todo, lambda cell: (cell.hosts, cell.mbit)):
        with Cluster(hosts, mbit, name) as cluster:
            for cell in group:
                row = _row(cluster, cell, rows, effort)
                rows[cell] = {**cell.__dict__, **row, "date": time.strftime("%Y-%m-%d"), **describe()}
                _write(rows, path)
                told = {column: row.get(column) for column in ("seconds_to_loss", "steps", "loss", "error")}
                print(cell, told, flush=True)


def _row(cluster: Cluster, cell: Cell, rows: Mapping[Cell, Row], effort: Effort) -> Row:
    elsewhere = _trained_elsewhere(cell, rows) if effort.compose else None
    if elsewhere is not None:
        return _composed(cluster, cell, elsewhere, effort)
    dense = rows.get(replace(cell, method=DENSE), {})
    if cell.method != DENSE and "target" not in dense:
        return {"error": "dense training has no loss to reach"}
    target = dense.get("target")
    told = _run(cluster, cell, effort, *([] if target is None else ["--target", f"{target!r}"]))
    return told if "error" in told else trained(told["curve"], target)


def trained(curve: list[list[float]], target: float | None) -> Row:
    """The row of a whole training; dense training's own goal is its lowest loss."""
    goal = min(loss for _, _, _, loss in curve) if target is None else target
    there = [moment for moment in curve if moment[3] <= goal]
    steps, seconds, sent, loss = (there or curve[-1:])[0]
    return {
        "seconds_to_loss": seconds if there else None,
        "bytes_per_rank": sent,
        "steps": steps,
        "target": goal,
        "loss": loss,
        "seconds_step": seconds / steps,
        "composed": False,
        "load": os.getloadavg()[0],
        "curve": curve,
    }


def _composed(cluster: Cluster, cell: Cell, elsewhere: Row, effort: Effort) -> Row:
    """Steps of a training on other links, times what a step takes here."""
    told = _run(cluster, cell, effort, "--timed", str(PERIOD))
    if "error" in told:
        return told
    reached = elsewhere["seconds_to_loss"] is not None
    kept = {column: elsewhere[column] for column in ("bytes_per_rank", "steps", "target", "loss")}
    return {
        "seconds_to_loss": elsewhere["steps"] * told["seconds_step"] if reached else None,
        **kept,
        "seconds_step": told["seconds_step"],
        "composed": True,
        "load": os.getloadavg()[0],
    }


def _trained_elsewhere(cell: Cell, rows: Mapping[Cell, Row]) -> Row | None:
    same = (row for other, row in rows.items() if replace(other, mbit=cell.mbit) == cell)
    return next((row for row in same if row.get("composed") is False), None)


def _run(cluster: Cluster, cell: Cell, effort: Effort, *more: str) -> Row:
    """What rank 0 of a run wrote, or why there is nothing."""
    with tempfile.TemporaryDirectory(prefix="time-to-loss-") as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log"
        worker = ("--model", cell.model, "--method", cell.method, "--seed", str(cell.seed), "--out", str(out))
        size = ("--steps", str(effort.steps), "--interval", str(effort.interval))
        command = [*LAUNCHERS[METHODS[cell.method].launcher](cluster.hosts), sys.executable]
        try:
            with log.open("w") as output:
                program = ("-m", "benchmarks.time_to_loss.worker", *worker, *size, *more)
                cluster.run([*command, *program], env=ENVIRONMENT, timeout=effort.limit, output=output)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {effort.limit:.0f} s"}
        told: Row = json.loads(out.read_text()) if out.exists() else {"error": reason(log.read_text(errors="replace"))}
        return told


def _write(rows: Mapping[Cell, Row], path: Path) -> None:
    order = {name: place for place, name in enumerate((*GOALS, *METHODS))}
    cells = sorted(rows, key=lambda cell: (cell.mbit, cell.hosts, order[cell.model], cell.seed, order[cell.method]))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("[\n" + ",\n".join(json.dumps(rows[cell]) for cell in cells) + "\n]\n")
    fresh.replace(path)
