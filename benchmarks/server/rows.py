"""Measured rows, kept in a file as they come, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results" / "server.json"

Row = dict[str, Any]


def read(path: Path = RESULTS) -> list[Row]:
    """All rows, none where there is no file yet."""
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text())
    return rows


def missing(experiment: str, cells: list[Row], path: Path = RESULTS) -> list[Row]:
    """Those of the cells that have no row of this experiment yet."""
    there = [row for row in read(path) if row["experiment"] == experiment]
    return [cell for cell in cells if not any(cell.items() <= row.items() for row in there)]


def add(experiment: str, cell: Row, measured: Row, path: Path = RESULTS) -> None:
    """Write a row behind the others."""
    rows = [*read(path), {"experiment": experiment, **cell, **measured}]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def parser(about: str) -> argparse.ArgumentParser:
    """What every experiment can be told."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    made.add_argument("--results", type=Path, default=RESULTS)
    return made


def grid(**values: Iterable[Any]) -> list[Row]:
    """A cell for every combination."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def fill(
    experiment: str, cells: list[Row], measure: Callable[[Row], Row], path: Path = RESULTS, comm: Any = None
) -> None:
    """Measure the cells that have no row yet, by all ranks of `comm` where there is one: its first keeps the rows."""
    first = comm is None or comm.rank == 0
    todo = missing(experiment, cells, path) if first else []
    for cell in todo if comm is None else comm.bcast(todo):
        measured = measure(cell)
        if first:
            add(experiment, cell, measured, path)
