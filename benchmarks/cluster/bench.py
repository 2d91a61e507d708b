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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.launchers import LAUNCHERS
from benchmarks.cluster.machine import describe
from benchmarks.cluster.methods import METHODS
from benchmarks.cluster.models import MODELS, parameters_of
from benchmarks.cluster.network import ClusterError
from hvd_sketch.sketch import native

RESULTS = Path(__file__).resolve().parent.parent / "results" / "cluster.json"
HOSTS = (2, 4, 8)
RATES = (100.0, 1000.0)
MODELS_OF_TABLE = tuple(name for name in MODELS if name != "transformer-0.4M")
METHODS_OF_TABLE = tuple(name for name in METHODS if not name.startswith("mpi"))
COLUMNS = ("hosts", "mbit", "models", "methods", "delay", "ranks_per_host")
"""The options that `grid` takes, in its order."""

Row = dict[str, Any]

ENVIRONMENT = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "600", "HOROVOD_CYCLE_TIME": "5"}
"""Horovod's ranks talk to each other in every cycle; in one of 1 ms, its default, this takes a third of the processors
that all hosts share here, and up to 0.4 times a sketched step's bytes."""

_START = 300.0  # seconds for a run's processes to start, on a machine that does other things too
_STEPS = 12  # dense steps that a run may take, for its time limit
_HOPS = 10  # of a step and of a gathering, for the same
_ENGINES = ("horovod", "sketch-40", "sharded-40", "topk-40")
_BOTH_ENGINES = (*_ENGINES, "mpi", *(f"mpi-{method}" for method in _ENGINES[1:]))
_DDP = ("ddp", "ddp-sharded-40", "ddp-powersgd-2")


@dataclass(frozen=True)
class Cell:
    """One row of the table before it is measured.

    Rows of a series were measured one after another, beside whatever else the machine did, and are to be compared with
    each other alone.
    """

    hosts: int
    mbit: float
    model: str
    method: str
    delay: float = 0.0
    ranks_per_host: int = 1
    series: str = ""

    @property
    def of_table(self) -> bool:
        """Whether this is a row of the large table: one rank a host, no delay."""
        return (self.delay, self.ranks_per_host, self.series) == (0.0, 1, "")

    @property
    def ranks(self) -> int:
        """How many ranks train."""
        return self.hosts * self.ranks_per_host

    @property
    def dense_bytes(self) -> float:
        """What a rank sends of uncompressed gradients in one step, in a ring."""
        return 2 * (self.ranks - 1) / self.ranks * 4 * parameters_of(self.model)

    @property
    def longest_step(self) -> float:
        """The wire's seconds for uncompressed gradients, and a message's there and back for every hop of two rings."""
        return wire_limit(self.dense_bytes, self.mbit) + _HOPS * (self.ranks - 1) * 2e-3 * self.delay


def grid(
    hosts: Sequence[int] = HOSTS,
    rates: Sequence[float] = RATES,
    models: Sequence[str] = MODELS_OF_TABLE,
    methods: Sequence[str] = METHODS_OF_TABLE,
    delays: Sequence[float] = (0.0,),
    ranks_per_host: Sequence[int] = (1,),
) -> list[Cell]:
    """The cells of these columns, all that one cluster can measure after another."""
    columns = product(hosts, rates, delays, models, methods, ranks_per_host)
    return [Cell(host, rate, model, method, delay, ranks) for host, rate, delay, model, method, ranks in columns]


def quick() -> list[Cell]:
    """A part of the table that takes about ten minutes."""
    return grid((4,), (100.0,), ("transformer-1M", "cnn-10M"))


def far() -> list[Cell]:
    """Hosts that are far apart: few bytes, so that what counts is how often a step crosses the links."""
    return grid(HOSTS, (1000.0,), ("transformer-0.4M",), (*_BOTH_ENGINES, *_DDP), (1.0, 20.0, 80.0))


def packed() -> list[Cell]:
    """Hosts with several ranks, which share a link."""
    methods = (*_BOTH_ENGINES, *(f"mpi-{method}-flat" for method in _ENGINES[1:]))
    two = grid((2,), RATES, ("transformer-1M",), methods, ranks_per_host=(1, 2, 4))
    four = grid((4,), RATES, ("transformer-1M",), methods, ranks_per_host=(1, 2))
    return [replace(cell, series="packed") for cell in (*two, *four)]


def ddp() -> list[Cell]:
    """DistributedDataParallel with every hook there is, beside Horovod."""
    hooked = [method for method in METHODS if method.startswith("ddp")]
    methods = ("horovod", "horovod-fp16", "sketch-40", "sharded-40", *hooked)
    cells = grid((2, 4), RATES, ("transformer-1M", "transformer-10M"), methods)
    return [replace(cell, series="ddp") for cell in cells]


PARTS: Mapping[str, tuple[Callable[[], list[Cell]], str]] = {
    "quick": (quick, "a part of the table that takes about ten minutes"),
    "far": (far, "hosts that are 1, 20 and 80 ms apart, a small model"),
    "ddp": (ddp, "DistributedDataParallel with every hook, beside Horovod"),
    "packed": (packed, "hosts with one, two and four ranks"),
}


def wire_limit(sent: float, mbit: float) -> float:
    """The seconds that a link of ``mbit`` Mbit/s needs for so many bytes."""
    return 8 * sent / (mbit * 1e6)


def read(path: Path = RESULTS) -> dict[Cell, Row]:
    """The rows measured so far."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return {_cell(row): row for row in rows}


def _cell(row: Row) -> Cell:
    place = row.get("delay", 0.0), row.get("ranks_per_host", 1), row.get("series", "")
    return Cell(row["hosts"], row["mbit"], row["model"], row["method"], *place)


def measure(cells: Iterable[Cell], path: Path = RESULTS, *, seconds: float, again: bool, name: str) -> None:
    """Measure the cells that have no row yet (with ``again``, all of them) and add them to the file.

    Raises:
        ClusterError: when the cluster cannot be brought up, or the native kernel was not built.
    """
    rows = read(path)
    todo = [cell for cell in cells if again or cell not in rows]
    if any("sketch" in cell.method for cell in todo) and not native.available():
        raise ClusterError("the native kernel is not built, and the reference is no measure: run `make env` first")
    for (hosts, mbit, delay), group in groupby(todo, lambda cell: (cell.hosts, cell.mbit, cell.delay)):
        with Cluster(hosts, mbit, name, delay=delay) as cluster:
            for cell in group:
                rows[cell] = _row(cluster, cell, seconds)
                _write(rows, path)
                print(_line(cell, rows[cell]), flush=True)


def _row(cluster: Cluster, cell: Cell, seconds: float) -> Row:
    parameters = parameters_of(cell.model)
    row: Row = {"hosts": cell.hosts, "mbit": cell.mbit, "params": parameters, "model": cell.model}
    row |= {"delay": cell.delay, "ranks_per_host": cell.ranks_per_host, "series": cell.series}
    row |= {"method": cell.method, "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], **describe()}
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log"
        worker = ("--model", cell.model, "--method", cell.method, "--seconds", f"{seconds:g}", "--out", str(out))
        launch = LAUNCHERS[METHODS[cell.method].launcher](cluster.hosts, cell.ranks_per_host)
        command = [*launch, sys.executable, "-m", "benchmarks.cluster.worker", *worker]
        limit = _START + 10 * cell.ranks + seconds + _STEPS * cell.longest_step
        try:
            with log.open("w") as output:
                cluster.run(command, env=ENVIRONMENT, timeout=limit, output=output)
        except subprocess.TimeoutExpired:
            return row | {"error": f"not done after {limit:.0f} s"}
        if not out.exists():
            return row | {"error": reason(log.read_text(errors="replace"))}
        return row | _derived(cell, json.loads(out.read_text()))


def _derived(cell: Cell, measured: Row) -> Row:
    """The row's columns: what was measured, by its name in the table, and what follows from it."""
    phases = measured.pop("phases")
    sent = measured["bytes_per_rank"]
    return {
        "ratio": cell.dense_bytes / sent,
        "seconds_exchange": measured["seconds_step"] - measured["seconds_compute"],
        "wire_limit_seconds": wire_limit(sent, cell.mbit),
        **{f"seconds_{'wire' if phase == 'exchange' else phase}": value for phase, value in phases.items()},
        **measured,
    }


def reason(log: str) -> str:
    """The line of a failed run's output that says most: the first error that some rank reports."""
    lines = [line.split(">:", 1)[-1].strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or "what():" in line]
    return (told or lines or ["no output"])[0][:300]


def _write(rows: dict[Cell, Row], path: Path) -> None:
    order = {name: place for place, name in enumerate((*MODELS, *METHODS))}
    cells = sorted(rows, key=lambda cell: (_place(cell), order[cell.model], order[cell.method]))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("[\n" + ",\n".join(json.dumps(rows[cell]) for cell in cells) + "\n]\n")
    fresh.replace(path)


def _place(cell: Cell) -> tuple[str, float, int, float, int]:
    return cell.series, cell.delay, cell.ranks_per_host, cell.mbit, cell.hosts


def _line(cell: Cell, row: Row) -> str:
    place = f"{cell.hosts} x {cell.ranks_per_host} ranks, {cell.mbit:g} Mbit/s, {cell.delay:g} ms, "
    place += f"{cell.model}, {cell.method}: "
    if "error" in row:
        return f"{place}{row['error']}"
    return place + (
        f"{row['seconds_step']:.4f} s a step, {row['seconds_exchange']:.4f} s of it exchange, "
        f"the wire's limit is {row['wire_limit_seconds']:.4f} s"
    )
