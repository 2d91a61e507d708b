"""The 17 numbers, fitted to the rows of the cluster's table, and how well they tell them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from benchmarks.cluster.bench import Cell, Row
from benchmarks.scale.model import Fitted, Place, names_of_numbers, seconds

NUMBERS = Path(__file__).resolve().parent.parent / "results" / "scale.json"
_START = Fitted(
    wire=1.07,
    halves=3e-9,
    cycle=2.5e-3,
    hop=1e-3,
    hop_negotiated=1e-3,
    sharing=1.0,
    overlap=0.5,
    sketch=4e-9,
    sketch_buckets=4e-9,
    in_turn=4e-9,
    in_turn_buckets=4e-9,
    sharded=6e-9,
    sharded_buckets=6e-9,
    topk=4e-9,
    powersgd=6e-9,
    powersgd_rank=1e-9,
    fp16=1e-9,
)
_ROBUST = 0.1  # errors above a tenth count less than their square: hours differ by that much

_DIRECT = "direct"  # the series of rows whose sums are two messages from everybody to everybody

Rows = Mapping[Cell, Row]

_ALIKE = {
    "horovod": "dense",
    "horovod-fp16": "fp16",
    "topk-40": "topk",
    "sketch-10": "sketch",
    "sketch-40": "sketch",
    "sketch-40-4-buckets": "sketch, 4 buckets",
    "sketch-40-in-turn": "sketch, in turn",
    "sketch-40-in-turn-4-buckets": "sketch, in turn, 4 buckets",
    "sharded-40": "sharded",
    "sharded-40-4-buckets": "sharded, 4 buckets",
    "mpi": "dense",
    "mpi-topk-40": "topk",
    "mpi-sketch-40": "sketch",
    "mpi-sharded-40": "sharded",
    "ddp": "dense",
    "ddp-sketch-40": "sketch",
    "ddp-sharded-40": "sharded",
    "ddp-powersgd-1": "powersgd 1",
    "ddp-powersgd-2": "powersgd 2",
    "ddp-powersgd-4": "powersgd 4",
}


def known(rows: Rows) -> dict[Cell, Row]:
    """The measured rows whose method the model has."""
    return {
        cell: row
        for cell, row in rows.items()
        if cell.method in _ALIKE and cell.series in ("", _DIRECT) and "error" not in row
    }


def fit(rows: Rows) -> Fitted:
    """The numbers that tell the exchange of these rows best, by the logarithm of the error."""
    places = [(_exchange(cell), place(cell, row), row["seconds_exchange"]) for cell, row in rows.items()]
    scale = np.array([getattr(_START, name) for name in names_of_numbers()])

    def errors(numbers: np.ndarray) -> np.ndarray:
        fitted = Fitted(*(numbers * scale))
        return np.array([np.log(seconds(what, where, fitted) / measured) for what, where, measured in places])

    found = least_squares(errors, np.ones(len(scale)), loss="soft_l1", f_scale=_ROBUST, bounds=(0.0, np.inf))
    return Fitted(*(float(number) for number in found.x * scale))


def place(cell: Cell, row: Row) -> Place:
    """Where a row was measured: all ranks share the machine's cores."""
    engine = "mpi" if cell.method.startswith("mpi") else "gloo" if cell.method.startswith("ddp") else "horovod"
    engine += f", {_DIRECT}" if cell.series == _DIRECT else ""
    cores = int(row["machine"].split()[0])
    size = row["params"], row["ratio"], cell.mbit
    return Place(engine, cell.hosts, *size, cell.delay, cell.ranks_per_host, shared_cores=cores)


def predicted(cell: Cell, row: Row, fitted: Fitted) -> float:
    """Seconds of this row's exchange by the model."""
    return seconds(_exchange(cell), place(cell, row), fitted)


def errors_of(rows: Rows, fitted: Fitted) -> list[float]:
    """How far the model is from each row, as a share of what was measured."""
    return [abs(predicted(cell, row, fitted) / row["seconds_exchange"] - 1) for cell, row in rows.items()]


def median_and_ninth(errors: list[float]) -> tuple[float, float]:
    """The median error, and the one that nine of ten are below."""
    return statistics.median(errors), float(np.quantile(errors, 0.9))


def write(fitted: Fitted, path: Path = NUMBERS) -> None:
    """Keep the numbers."""
    path.write_text(json.dumps(fitted.__dict__, indent=1) + "\n")


def read(path: Path = NUMBERS) -> Fitted:
    """The numbers that were kept."""
    return Fitted(**json.loads(path.read_text()))


def _exchange(cell: Cell) -> str:
    alike = _ALIKE[cell.method]
    return "sharded, header in its codes" if (alike, cell.series) == ("sharded", _DIRECT) else alike
