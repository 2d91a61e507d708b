"""Measured rows, kept in a file as they come, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import json
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
