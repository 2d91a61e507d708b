"""Rows of measurements on their way to a file that is complete after each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_END = "\n]\n"


class Record:
    """A JSON list of rows in a file; whoever reads it, at any moment, sees all rows so far."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self) -> None:
        """Begin an empty list."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("[" + _END)

    def append(self, row: Row) -> None:
        """Add a row, and print it."""
        text = self._path.read_text().removesuffix(_END)
        separator = "," if text != "[" else ""
        self._path.write_text(f"{text}{separator}\n{json.dumps(row)}{_END}")
        print(_line(row), flush=True)

    def replace(self, rows: list[Row]) -> None:
        """Hold these rows and no others."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + _END)

    def rows(self) -> list[Row]:
        """All rows."""
        rows: list[Row] = json.loads(self._path.read_text())
        return rows


def _line(row: Row) -> str:
    text = f"{row.get('op', ''):>14} {row.get('impl', ''):34} d={row.get('d', 0):<11d}"
    if "failed" in row:
        return f"{text} FAILED {row['failed'][:300]}"
    if row.get("seconds") is not None:
        text += f" {1e3 * row['seconds']:10.3f} ms, host {1e3 * row['host_seconds']:9.3f}"
    for name in ("passes", "waits", "launches"):
        if row.get(name) is not None:
            text += f", {row[name]:.1f} {name}" if name == "passes" else f", {row[name]} {name}"
    return text + "".join(f", {name} {row[name]}" for name in ("passed", "note") if row.get(name))
