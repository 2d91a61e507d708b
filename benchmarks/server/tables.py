"""What the sections of the page have in common."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.server.rows import Row


def where(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Those that have these values."""
    return [row for row in rows if values.items() <= row.items()]


def seeds(rows: Iterable[Row]) -> str:
    """Of the rows, to be read."""
    return ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))


def mean(rows: Sequence[Row], name: str) -> float:
    """Of what all of them have."""
    return statistics.fmean(row[name] for row in rows)


def percent(shares: Sequence[float]) -> str:
    """The mean, in percent."""
    return f"{100 * statistics.fmean(shares):.1f}" if shares else "-"


def verdict(rows: Sequence[Row]) -> str:
    """Honest pushes refused / hostile ones accepted, in percent."""
    refused = [row["refused"] for row in rows]
    missed = [row["missed"] for row in rows if not math.isnan(row["missed"])]
    return f"{percent(refused)} / {percent(missed)}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
