"""The parts of the page beside the large table: DistributedDataParallel, links with delay, several ranks a host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from benchmarks.cluster.bench import Cell, Row
from benchmarks.cluster.methods import METHODS

Rows = Mapping[Cell, Row]

_DDP = """\
## DistributedDataParallel

Measured one after another in one series, beside other programs (load), and so to be compared with each other alone.
**ddp / this** and **horovod / this**: how many times as fast a step is as those of plain DistributedDataParallel and
plain Horovod of the same series. PyTorch's hook for bfloat16 refuses Gloo, and has no row. The PowerSGD hook gets all
gradients in one bucket, see [there](../cluster.md#the-benchmark).

"""
_FAR = """\
## Links with delay

{models}, {rates} Mbit/s, one rank a host: seconds of the exchange, by one-way delay and number of hosts. Methods that
begin with `mpi` are ours over mpi4py, all others run on Gloo: within Horovod, or with `ddp` without it. The bytes of a
compressed gradient need at most {limit:.1f} ms of a link; the rest is messages that wait for each other, and what the
hosts' two cores do. Direct: sums as two messages from everybody to everybody, and the header of `sharded` in its
codes, as the package does by itself where a round trip is long; the other rows are from before.
[The model](scale.md#against-what-was-measured) counts them. Measured beside other programs: load {load}.

"""
_PACKED = """\
## Several ranks a host

Ranks of a host share its link. Over mpi4py a host's ranks sum inside it first and send one message, by themselves;
those that end in `flat` were told not to, and over Horovod every rank sends its own. **MB of the interface**: TCP
payload that a host sends in a step, by its counters, all its ranks together; **of one rank**: the same over the row
with one rank a host. Measured beside other programs: load {load}.

"""


def ddp(rows: Rows) -> str:
    """The series of DistributedDataParallel and its hooks."""
    shown = {cell: row for cell, row in rows.items() if cell.series == "ddp"}
    lines = []
    for cell, row in shown.items():
        ratios = [_ratio(shown.get(replace(cell, method=base)), row) for base in ("ddp", "horovod")]
        place = [str(cell.hosts), f"{cell.mbit:g}", cell.model, cell.method]
        times = [f"{row[f'seconds_{name}']:.4f}" for name in ("step", "compute", "exchange")]
        sent = f"{row['bytes_per_rank'] / 1000:.0f}"
        lines.append([*place, *times, sent, *ratios, f"{row['load']:.1f}", str(row["runs"])])
    columns = ("hosts", "Mbit/s", "model", "method", "step", "compute", "exchange", "kB a rank")
    return _DDP + table(4, (*columns, "ddp / this", "horovod / this", "load", "runs"), lines) if lines else ""


def far(rows: Rows) -> str:
    """The rows with delay: a line a method, a column a delay and number of hosts."""
    shown = {cell: row for cell, row in rows.items() if cell.delay and cell.ranks_per_host == 1}
    if not shown:
        return ""
    places = sorted({(cell.delay, cell.hosts) for cell in shown})
    told = {(_name(cell), cell.delay, cell.hosts): f"{row['seconds_exchange']:.3f}" for cell, row in shown.items()}
    ordered = sorted(shown, key=lambda cell: (cell.series, list(METHODS).index(cell.method)))
    lines = [
        [name, *(told.get((name, *place), "") for place in places)] for name in dict.fromkeys(map(_name, ordered))
    ]
    compressed = [row["wire_limit_seconds"] for row in shown.values() if row["ratio"] > 2]
    head = _FAR.format(
        models=_listed(cell.model for cell in shown),
        rates=_listed(f"{cell.mbit:g}" for cell in shown),
        limit=1000 * max(compressed, default=0.0),
        load=_span(row["load"] for row in shown.values()),
    )
    return head + table(1, ("method", *(f"{delay:g} ms, {hosts} hosts" for delay, hosts in places)), lines)


def packed(rows: Rows) -> str:
    """The rows of hosts with several ranks, beside those with one, measured in the same series."""
    shown = {cell: row for cell, row in rows.items() if cell.series == "packed"}
    ordered = sorted(shown, key=lambda cell: (cell.hosts, cell.mbit, list(METHODS).index(cell.method)))
    lines = []
    for _, group in groupby(ordered, lambda cell: (cell.hosts, cell.mbit, cell.method)):
        for cell in sorted(group, key=lambda cell: cell.ranks_per_host):
            row, alone = shown[cell], shown.get(replace(cell, ranks_per_host=1))
            share = f"{row['counter_bytes_per_rank'] / alone['counter_bytes_per_rank']:.2f}" if alone else ""
            place = [f"{cell.hosts} x {cell.ranks_per_host}", f"{cell.mbit:g}", cell.model, cell.method]
            times = [f"{row[f'seconds_{name}']:.4f}" for name in ("step", "exchange")]
            lines.append([*place, *times, f"{row['counter_bytes_per_rank'] / 1e6:.3f}", share])
    columns = ("hosts x ranks", "Mbit/s", "model", "method", "step", "exchange", "MB of the interface", "of one rank")
    head = _PACKED.format(load=_span(row["load"] for row in shown.values()))
    return head + table(4, columns, lines) if lines else ""


def table(words: int, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first columns are words, and the others numbers."""
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * words + "---:|" * (len(columns) - words)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def _name(cell: Cell) -> str:
    return f"`{cell.method}`, {cell.series}" if cell.series else f"`{cell.method}`"


def _ratio(base: Row | None, row: Row) -> str:
    return f"{base['seconds_step'] / row['seconds_step']:.2f}" if base else ""


def _listed(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))


def _span(values: Iterable[float]) -> str:
    numbers = list(values) or [0.0]
    return f"{min(numbers):.0f} to {max(numbers):.0f}"
