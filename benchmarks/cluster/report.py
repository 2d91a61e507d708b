"""The page and the pictures that explain the table: ``docs/benchmarks/cluster.md``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from string import ascii_uppercase

from benchmarks.cluster import sections
from benchmarks.cluster.bench import Cell, Row
from benchmarks.cluster.pictures import draw

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks" / "cluster.md"

OURS = ("sketch", "topk", "sharded")
_BASELINE = "horovod"
_SKETCHES = ("sketch-40", "sketch-40-4-buckets", "sketch-40-in-turn", "sketch-40-in-turn-4-buckets")
_OTHERS = ("topk-40", "sharded-40", "sharded-40-4-buckets")
_TOLERANCE = 0.05
_HEAD = """\
# Steps over slow links, measured

This page is written by `python -m benchmarks.cluster report` from
[`benchmarks/results/cluster.json`](../../benchmarks/results/cluster.json); [the cluster on one machine](../cluster.md)
says how the rows come about and how to measure your own.

Measured on

{machines}
- **on**: which of these a row is from. What is measured changes from day to day as well: compare rows of the same one.
- **step**: seconds of a whole training step, the median of the runs; the slowest host counts.
- **compute**: the same step without any exchange, all hosts at the same time.
- **exchange**: step minus compute, so all that the method costs: its arithmetic, its messages and its waiting.
- **wire**, for our methods: the part of the exchange spent waiting for collectives, slower hosts included. What
  `sketch` computes while its collectives are under way is not in it, so it may be below the limit.
- **limit**: what the link needs for the bytes that a rank sends, `8 bytes / rate`. Headers of Ethernet, IP and TCP and
  their acknowledgements add 7 % that nobody can avoid; they are not in the bytes, and not in the limit.
- **counted**: TCP payload by the counters of the host's interface, over the bytes that the method itself reports.
- **load**: processes that wanted a core in the minute before the row, those of the row before it included.
  The ranks themselves make about twice the number of hosts; with more, other programs were running, over which the
  ranks have priority, but with which they share caches and memory.
- **faster**: the step of plain Horovod over this one.

All hosts share {cores} cores. With more hosts than cores they compute, sketch and select one after the other, so every
method with arithmetic of its own looks slower here than on real hosts, ours more than others; **processor** is what a
rank really used of a core in a step, and the better guide for hosts with a core to spare; 2 hosts have one each. Links
have no delay of their own (0.1 ms there and back), so methods with many small messages look better here than between
cities; [some have](#links-with-delay). Horovod's cycle is 5 ms for all that run on it, see
[there](../cluster.md#where-a-sketched-steps-time-goes).
"""


def write(rows: dict[Cell, Row], page: Path = PAGE) -> None:
    """Write the page and its pictures beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    told = {cell: row for cell, row in rows.items() if "error" not in row}
    measured = {cell: row for cell, row in told.items() if cell.of_table}
    machines = _machines(rows.values())
    cores = " or ".join(sorted({machine.split()[0] for _, machine, _ in machines}))
    listed = "".join(f"- **{name}**: {date}, {on}; {software}.\n" for (date, on, software), name in machines.items())
    parts = [_HEAD.format(machines=listed, cores=cores)]
    parts.append(_goal(measured))
    parts.append("## Where something else is faster\n\n" + _lost(measured))
    parts += [sections.ddp(told), sections.far(told), sections.packed(told)]
    parts.append("## When not to compress\n\n" + _break_even(measured))
    parts.append("## Bytes by formula, and by the link\n\n" + _counted(measured))
    for mbit, group in groupby(filter(_of_table, rows), lambda cell: cell.mbit):
        cells = list(group)
        name = f"cluster-{mbit:g}.svg"
        draw({cell: measured[cell] for cell in cells if cell in measured}, page.parent / name)
        parts.append(f"## {mbit:g} Mbit/s\n\n![Seconds per step at {mbit:g} Mbit/s]({name})\n\n{_table(cells, rows)}")
    parts.append(_failed(rows))
    page.write_text("\n".join(part for part in parts if part))


def _of_table(cell: Cell) -> bool:
    return cell.of_table


def _machine(row: Row) -> tuple[str, str, str]:
    return row["date"], row["machine"], row["software"]


def _machines(rows: Iterable[Row]) -> dict[tuple[str, str, str], str]:
    """A letter for every day, machine and its software, in the order in which they were measured on."""
    return dict(zip(sorted({_machine(row) for row in rows}), ascii_uppercase, strict=False))


def _table(cells: Iterable[Cell], rows: dict[Cell, Row]) -> str:
    columns = ["hosts", "model", "method", "step", "compute", "exchange", "wire", "limit", "exchange / limit"]
    columns += ["kB a rank", "counted", "processor", "load", "on", "faster", "runs"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * 3 + "---:|" * (len(columns) - 3)]
    machines = _machines(rows.values())
    lines += [_line(cell, rows, machines[_machine(rows[cell])]) for cell in cells if "error" not in rows[cell]]
    return "\n".join(lines) + "\n"


def _line(cell: Cell, rows: dict[Cell, Row], machine: str) -> str:
    row = rows[cell]
    values = [
        str(cell.hosts),
        cell.model,
        cell.method,
        *(_seconds(row.get(f"seconds_{name}")) for name in ("step", "compute", "exchange", "wire")),
        _seconds(row["wire_limit_seconds"]),
        f"{row['seconds_exchange'] / row['wire_limit_seconds']:.2f}",
        f"{row['bytes_per_rank'] / 1000:.0f}",
        f"{row['counter_bytes_per_rank'] / row['bytes_per_rank']:.3f}",
        _seconds(row["seconds_processor"]),
        f"{row['load']:.1f}",
        machine,
        _faster(cell, rows),
        str(row["runs"]),
    ]
    return "| " + " | ".join(values) + " |"


def _faster(cell: Cell, rows: dict[Cell, Row]) -> str:
    baseline = rows.get(_sibling(cell, _BASELINE), {})
    return f"{baseline['seconds_step'] / rows[cell]['seconds_step']:.2f}" if "seconds_step" in baseline else ""


def _goal(measured: dict[Cell, Row]) -> str:
    """How far the aim is: 100 Mbit/s, 4 hosts, 10 M parameters, ratio 40."""
    lines = []
    for hosts, model, method in product((4, 2), ("transformer-10M", "cnn-10M"), _SKETCHES):
        ours, dense = (measured.get(Cell(hosts, 100.0, model, name)) for name in (method, _BASELINE))
        if ours is None or dense is None:
            continue
        limit = ours["wire_limit_seconds"]
        lines.append(
            f"- {hosts} hosts, {model}, {method}: {dense['seconds_exchange'] / ours['seconds_exchange']:.1f} times "
            f"less exchange than plain Horovod; the exchange takes {ours['seconds_exchange'] / limit:.2f} times the "
            f"wire's limit, waiting for its collectives {ours['seconds_wire'] / limit:.2f} times.\n"
        )
    lines += [_same_bytes(model, measured) for model in ("transformer-10M", "cnn-10M")]
    head = (
        "## The aim\n\nAt 100 Mbit/s, 4 hosts, 10 M parameters and ratio 40: 20 times less exchange, "
        "and at most 1.3 times the wire's limit. Measured, and the same with a core for every host:\n\n"
    )
    return head + "".join(lines) if lines else ""


def _same_bytes(model: str, measured: dict[Cell, Row]) -> str:
    """The exchange of all methods that send as many bytes as `sketch-40`."""
    rows = {name: measured.get(Cell(4, 100.0, model, name)) for name in (*_SKETCHES, *_OTHERS)}
    told = [f"{name} {_seconds(row['seconds_exchange'])} s" for name, row in rows.items() if row is not None]
    return f"- 4 hosts, {model}, exchange at the same bytes: {', '.join(told)}.\n" if told else ""


def _counted(measured: dict[Cell, Row]) -> str:
    """The rows whose formula and whose link disagree by more than 5 %."""
    lines = []
    for cell, row in measured.items():
        ratio = row["counter_bytes_per_rank"] / row["bytes_per_rank"]
        if abs(ratio - 1.0) > _TOLERANCE:
            lines.append(
                f"- {cell.hosts} hosts, {cell.mbit:g} Mbit/s, {cell.model}, {cell.method}: {ratio:.3f} times the "
                f"formula's {row['bytes_per_rank'] / 1000:.0f} kB.\n"
            )
    head = (
        f"{len(measured) - len(lines)} of {len(measured)} rows agree within {_TOLERANCE:.0%}. Horovod's negotiation, "
        "in every cycle of a step, and what TCP sends again are counted by the link and not by the formula. "
    )
    return head + ("More than that:\n\n" + "".join(lines) if lines else "\n")


def _lost(measured: dict[Cell, Row]) -> str:
    """Every place of the table whose fastest method is not one of ours."""
    lines = []
    for (hosts, mbit, model), group in groupby(measured, lambda cell: (cell.hosts, cell.mbit, cell.model)):
        cells = sorted(group, key=lambda cell: float(measured[cell]["seconds_step"]))
        ours = [cell for cell in cells if cell.method.startswith(OURS)]
        if not ours or cells[0] in ours:
            continue
        best, own = measured[cells[0]], measured[ours[0]]
        lines.append(
            f"- {hosts} hosts, {mbit:g} Mbit/s, {model}: {cells[0].method} takes {_seconds(best['seconds_step'])} s "
            f"a step with {best['bytes_per_rank'] / 1000:.0f} kB, {ours[0].method}, our fastest, "
            f"{_seconds(own['seconds_step'])} s with {own['bytes_per_rank'] / 1000:.0f} kB.\n"
        )
    return "".join(lines) or "Nowhere in this table.\n"


def _break_even(measured: dict[Cell, Row]) -> str:
    """The rate above which a dense gradient is through before a sketched step's own work is done."""
    lines = []
    for cell, row in measured.items():
        if cell.method != "sketch-40" or cell.hosts != min(other.hosts for other in measured):
            continue
        work = row["seconds_processor"] - row["seconds_compute"]
        rate = 8 * row["bytes_per_rank"] * (row["ratio"] - 1) / work / 1e6
        lines.append(
            f"- {cell.hosts} hosts, {cell.mbit:g} Mbit/s, {cell.model}: {1000 * work:.0f} ms of one core; "
            f"a link saves more than that below {rate:.0f} Mbit/s.\n"
        )
    return (
        "A sketched step takes processor time of its own: sketching, selecting, keeping the memory, and the messages "
        "themselves. Where a network carries the dense gradient in less, or hides it behind a long backward pass, "
        "use `Compression.none` or `fp16`, which change little or nothing in how a model converges. PowerSGD sends "
        "fewer bytes at its low ranks; its ratio is fixed by the layers' shapes. This table only counts seconds: "
        "what a method's bytes buy in accuracy is measured elsewhere. Processor time less compute of `sketch-40`:\n\n"
    ) + ("".join(lines) or "- no row yet\n")


def _failed(rows: dict[Cell, Row]) -> str:
    lines = [
        f"- {cell.hosts} hosts of {cell.ranks_per_host}, {cell.mbit:g} Mbit/s, {cell.delay:g} ms, {cell.model}, "
        f"{cell.method}: {row['error']}\n"
        for cell, row in rows.items()
        if "error" in row
    ]
    return "## Rows that failed\n\n" + "".join(lines) if lines else ""


def _sibling(cell: Cell, method: str) -> Cell:
    return replace(cell, method=method)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 1 else f"{value:.2f}"
