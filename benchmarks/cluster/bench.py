"""The table: every method on every model, cluster size and link rate, one row at a time.

Rows are written as they finish, and those that are there already are not measured again, so a run that was interrupted
goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.launchers import horovodrun
from benchmarks.cluster.machine import describe
from benchmarks.cluster.methods import METHODS
from benchmarks.cluster.models import MODELS, parameters_of
from benchmarks.cluster.network import ClusterError
from hvd_sketch.sketch import native

RESULTS = Path(__file__).resolve().parent.parent / "results" / "cluster.json"
HOSTS = (2, 4, 8)
RATES = (100.0, 1000.0)

Row = dict[str, Any]

_HOROVOD = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "600", "HOROVOD_CYCLE_TIME": "5"}
"""Horovod's ranks talk to each other in every cycle; in one of 1 ms, its default, this takes a third of the processors
that all hosts share here, and up to 0.4 times a sketched step's bytes."""

_START = 90.0  # seconds for a run's processes to start, on a machine that does other things too
_STEPS = 12  # dense steps that a run may take, for its time limit


@dataclass(frozen=True)
class Cell:
    """One row of the table before it is measured."""

    hosts: int
    mbit: float
    model: str
    method: str

    @property
    def dense_seconds(self) -> float:
        """What the wire needs at least for the uncompressed gradients of one step."""
        sent = 2 * (self.hosts - 1) / self.hosts * 4 * parameters_of(self.model)
        return wire_limit(sent, self.mbit)


def grid(
    hosts: Sequence[int] = HOSTS,
    rates: Sequence[float] = RATES,
    models: Sequence[str] = tuple(MODELS),
    methods: Sequence[str] = tuple(METHODS),
) -> list[Cell]:
    """The cells of these sizes, rates, models and methods, in the order in which they are measured."""
    return [Cell(*choice) for choice in product(hosts, rates, models, methods)]


def quick() -> list[Cell]:
    """A part of the table that takes about ten minutes."""
    return grid((4,), (100.0,), ("transformer-1M", "cnn-10M"))


def wire_limit(sent: float, mbit: float) -> float:
    """The seconds that a link of ``mbit`` Mbit/s needs for so many bytes."""
    return 8 * sent / (mbit * 1e6)


def read(path: Path = RESULTS) -> dict[Cell, Row]:
    """The rows measured so far."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return {Cell(row["hosts"], row["mbit"], row["model"], row["method"]): row for row in rows}


def measure(cells: Iterable[Cell], path: Path = RESULTS, *, seconds: float, again: bool, name: str) -> None:
    """Measure the cells that have no row yet (with ``again``, all of them) and add them to the file.

    Raises:
        ClusterError: when the cluster cannot be brought up, or the native kernel was not built.
    """
    rows = read(path)
    todo = [cell for cell in cells if again or cell not in rows]
    if any(cell.method.startswith("sketch") for cell in todo) and not native.available():
        raise ClusterError("the native kernel is not built, and the reference is no measure: run `make env` first")
    for (hosts, mbit), group in groupby(todo, lambda cell: (cell.hosts, cell.mbit)):
        with Cluster(hosts, mbit, name) as cluster:
            for cell in group:
                rows[cell] = _row(cluster, cell, seconds)
                _write(rows, path)
                print(_line(cell, rows[cell]), flush=True)


def _row(cluster: Cluster, cell: Cell, seconds: float) -> Row:
    parameters = parameters_of(cell.model)
    row: Row = {"hosts": cell.hosts, "mbit": cell.mbit, "params": parameters, "model": cell.model}
    row |= {"method": cell.method, "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], **describe()}
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log"
        worker = ("--model", cell.model, "--method", cell.method, "--seconds", f"{seconds:g}", "--out", str(out))
        command = [*horovodrun(cluster.hosts), sys.executable, "-m", "benchmarks.cluster.worker", *worker]
        limit = _START + 10 * cell.hosts + seconds + _STEPS * cell.dense_seconds
        try:
            with log.open("w") as output:
                cluster.run(command, env=_HOROVOD, timeout=limit, output=output)
        except subprocess.TimeoutExpired:
            return row | {"error": f"not done after {limit:.0f} s"}
        if not out.exists():
            return row | {"error": _reason(log.read_text(errors="replace"))}
        return row | _derived(cell, json.loads(out.read_text()))


def _derived(cell: Cell, measured: Row) -> Row:
    """The row's columns: what was measured, by its name in the table, and what follows from it."""
    phases = measured.pop("phases")
    sent = measured["bytes_per_rank"]
    dense = 2 * (cell.hosts - 1) / cell.hosts * 4 * parameters_of(cell.model)
    return {
        "ratio": dense / sent,
        "seconds_exchange": measured["seconds_step"] - measured["seconds_compute"],
        "wire_limit_seconds": wire_limit(sent, cell.mbit),
        **{f"seconds_{'wire' if phase == 'exchange' else phase}": value for phase, value in phases.items()},
        **measured,
    }


def _reason(log: str) -> str:
    """The line of a failed run's output that says most: the first error that some rank reports."""
    lines = [line.split(">:", 1)[-1].strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or "what():" in line]
    return (told or lines or ["no output"])[0][:300]


def _write(rows: dict[Cell, Row], path: Path) -> None:
    order = {name: place for place, name in enumerate((*MODELS, *METHODS))}
    cells = sorted(rows, key=lambda cell: (cell.mbit, cell.hosts, order[cell.model], order[cell.method]))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("[\n" + ",\n".join(json.dumps(rows[cell]) for cell in cells) + "\n]\n")
    fresh.replace(path)


def _line(cell: Cell, row: Row) -> str:
    place = f"{cell.hosts} hosts, {cell.mbit:g} Mbit/s, {cell.model}, {cell.method}: "
    if "error" in row:
        return f"{place}{row['error']}"
    return place + (
        f"{row['seconds_step']:.4f} s a step, {row['seconds_exchange']:.4f} s of it exchange, "
        f"the wire's limit is {row['wire_limit_seconds']:.4f} s"
    )
