"""The page: ``docs/benchmarks/time_to_loss.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from benchmarks.time_to_loss.methods import PERIOD
from benchmarks.time_to_loss.rows import DENSE, Cell, Row

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks" / "time_to_loss.md"
_HEAD = f"""\
# Time to the loss of dense training

This page is written by `make time-to-loss` from
[`benchmarks/results/time_to_loss.json`](../../benchmarks/results/time_to_loss.json). Every method trains on
[the cluster](../cluster.md), from the same start on the same batches, until its validation loss is at most the lowest
that dense Horovod reaches in its steps; after three times as many steps it is given up, and has no time. The learning
rate is the one tuned for dense training, constant after a warm-up.

- **seconds**: of training until then, without the evaluations; a hyphen where the loss was not reached.
- **sooner**: dense Horovod's seconds over these, of the same cell and seed.
- **MB**: what a rank has sent until then.
- **composed**: the steps are those of the same training on faster links, times the seconds of a step measured here;
  what the links carry is the same, so the steps are too. All other rows are whole trainings.
- `diloco-{PERIOD}` is local SGD with DiLoCo's outer momentum (0.9, rate 0.7, Nesterov) that meets in every {PERIOD}
  steps, so as many bytes a step as at a ratio of {PERIOD}; `auto-40` and `ddp-auto-40` are ours as the README drops
  them in; in `auto-40-warm-up` the ratio grows from 1 over 100 steps, which is most of what that sends in a short
  training.

All hosts share the cores of one machine, on which other programs may run at the same time: load is what wanted a core
when a row ended. Compare rows of a cell with each other alone.
"""


def write(rows: Mapping[Cell, Row], page: Path = PAGE) -> None:
    """Write the page."""
    parts = [_HEAD]
    for (hosts, mbit, model), group in groupby(rows, lambda cell: (cell.hosts, cell.mbit, cell.model)):
        cells = list(group)
        parts.append(f"## {hosts} hosts, {mbit:g} Mbit/s, {model}\n\n{_table(cells, rows)}")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts))


def _table(cells: list[Cell], rows: Mapping[Cell, Row]) -> str:
    columns = (
        "method",
        "seed",
        "seconds",
        "sooner",
        "steps",
        "MB",
        "loss",
        "goal",
        "seconds a step",
        "composed",
        "load",
    )
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *(_line(cell, rows) for cell in cells)]) + "\n"


def _line(cell: Cell, rows: Mapping[Cell, Row]) -> str:
    row, dense = rows[cell], rows.get(replace(cell, method=DENSE), {})
    if "error" in row:
        return f"| {cell.method} | {cell.seed} | {row['error']} |" + " |" * 8
    seconds, base = row["seconds_to_loss"], dense.get("seconds_to_loss")
    values = [
        cell.method,
        str(cell.seed),
        f"{seconds:.1f}" if seconds else "-",
        f"{base / seconds:.2f}" if seconds and base else "-",
        str(row["steps"]),
        f"{row['bytes_per_rank'] / 1e6:.1f}",
        f"{row['loss']:.4f}",
        f"{row['target']:.4f}",
        f"{row['seconds_step']:.4f}",
        "yes" if row["composed"] else "",
        f"{row['load']:.1f}",
    ]
    return "| " + " | ".join(values) + " |"
