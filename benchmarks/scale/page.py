"""The page of predictions: ``docs/benchmarks/scale.md``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks.cluster.bench import RATES
from benchmarks.scale.engines import ENGINES
from benchmarks.scale.fit import Rows, errors_of, fit, known, median_and_ninth, predicted
from benchmarks.scale.model import Fitted, Place, seconds

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks" / "scale.md"

HOSTS = (2, 8, 64, 512, 4096)
DELAYS = {"rack": 0.05, "campus": 1.0, "20 ms": 20.0, "80 ms": 80.0}
_RATIO = 40.0
_SHORT = {"dense": "D", "sketch": "S", "sharded": "Sh", "topk": "T", "sharded, header in its codes": "Sh"}
_BUILT = ("dense", "sketch", "sharded", "topk")
_DIRECT = ("sketch", "sharded, header in its codes")
_PACKET, _SMALLEST = 1460, 180  # bytes of a TCP packet; of a code whose levels and checksum are a tenth of it
_TIMES = 2.0  # slower than the fastest of all, an exchange counts as broken
_HEAD = """\
# Exchanges on clusters that are not at hand

**Predicted, not measured.** This page is written by `python -m benchmarks.scale` from the model in
[`benchmarks/scale`](../../benchmarks/scale/model.py): how often an exchange crosses the links by what the engines do,
the bytes of a host's interface, and 17 numbers fitted to measured rows. It counts seconds of an exchange alone; what a
method's bytes buy in accuracy is [measured elsewhere](accuracy.md). There are no stragglers in it, no losses, no
windows of TCP that open slowly, and nothing that a cluster of more than 8 hosts would have taught us.

## Against what was measured

The numbers are fitted to the rows of [the cluster's table](cluster.md) with one rank a host and no delay
(`python -m benchmarks.scale fit`), whose hosts share two cores; what they say of shared cores is left out of the
predictions below. Error: of the predicted exchange, as a share of the measured one.

"""
_FAR = """
Links with delay, 0.4 M parameters. Nothing here was fitted: hops are counted from what the engines do. Median error
{median:.0%}, nine of ten below {ninth:.0%}. Over Open MPI a message above its eager limit of 64 KiB takes three
delays a hop, and the window of TCP opens from 14.6 kB. Neither is in the model, so what is large (dense) takes longer
there; and its ranks spin, of which up to eight shared two cores with other programs here.

"""
_PREDICTIONS = """\
## Seconds of an exchange

Ratio 40; a core for every rank. Each cell has dense on its fastest engine / the fastest over Horovod with Gloo / the
fastest over mpi4py with Open MPI 4.1 / direct: on Gloo without negotiation, where every collective is one message from
everybody to everybody, `sharded` has its header in its codes, and a host's ranks sum inside it first. D dense,
S `sketch`, Sh `sharded`, T `topk`; 2 behind a letter: in two levels of groups. The fastest is not the most accurate:
`topk` sends less of every gradient the more ranks there are, and `sharded` ends nearer to dense than `sketch`.

"""
_BREAKS = """\
## Where each exchange breaks

10 M coordinates, one rank a host, 1 Gbit/s: the first power of two of hosts with which an exchange takes more than
{times:g} times the fastest of all, up to {most}.

"""


def write(rows: Rows, fitted: Fitted, page: Path = PAGE) -> None:
    """Write the page from the measured rows and the numbers fitted to them."""
    parts = [_HEAD, _errors(rows, fitted), _numbers(fitted), _predictions(fitted), _breaks(fitted), _codes()]
    page.write_text("\n".join(parts))


def _errors(rows: Rows, fitted: Fitted) -> str:
    table = {cell: row for cell, row in known(rows).items() if cell.of_table}
    lines = [_error("all", table, fitted)]
    for hosts in sorted({cell.hosts for cell in table}):
        some = {cell: row for cell, row in table.items() if cell.hosts == hosts}
        rest = {cell: row for cell, row in table.items() if cell.hosts != hosts}
        lines += [
            _error(f"{hosts} hosts", some, fitted),
            _error(f"{hosts} hosts, fitted on the others", some, fit(rest)),
        ]
    for mbit in RATES:
        some = {cell: row for cell, row in table.items() if cell.mbit == mbit}
        rest = {cell: row for cell, row in table.items() if cell.mbit != mbit}
        lines += [_error(f"{mbit:g} Mbit/s", some, fitted)]
        lines += [_error(f"{mbit:g} Mbit/s, fitted on the other", some, fit(rest))]
    for method in sorted({cell.method for cell in table}):
        lines.append(_error(f"`{method}`", {c: row for c, row in table.items() if c.method == method}, fitted))
    return _table(("rows", "number", "median", "nine of ten below"), lines) + "\n" + _far(rows, fitted)


def _error(name: str, rows: Rows, fitted: Fitted) -> list[str]:
    median, ninth = median_and_ninth(errors_of(rows, fitted))
    return [name, str(len(rows)), f"{median:.0%}", f"{ninth:.0%}"]


def _far(rows: Rows, fitted: Fitted) -> str:
    """The rows with delay, none of which was fitted."""
    far = {cell: row for cell, row in known(rows).items() if cell.delay}
    if not far:
        return ""
    lines = []
    for cell, row in far.items():
        told, measured = predicted(cell, row, fitted), row["seconds_exchange"]
        method = f"`{cell.method}`" + (f", {cell.series}" if cell.series else "")
        place = f"{cell.delay:g}", str(cell.hosts), f"{cell.mbit:g}", method
        lines.append([*place, f"{measured:.3f}", f"{told:.3f}", f"{told / measured:.2f}"])
    columns = ("one way ms", "hosts", "Mbit/s", "method", "measured", "predicted", "predicted / measured")
    median, ninth = median_and_ninth(errors_of(far, fitted))
    return _FAR.format(median=median, ninth=ninth) + _table(columns, lines)


def _numbers(fitted: Fitted) -> str:
    told = [[f"`{name}`", f"{value:.3g}"] for name, value in fitted.__dict__.items()]
    return f"The numbers, in seconds where they are times:\n\n{_table(('number', 'value'), told)}"


def _predictions(fitted: Fitted) -> str:
    lines = []
    for coordinates, ranks, mbit in product((1e7, 1e8), (1, 8), (100.0, 1000.0, 10000.0)):
        for name, delay in DELAYS.items():
            places = [Place("", hosts, coordinates, _RATIO, mbit, delay, ranks) for hosts in HOSTS]
            start = [f"{coordinates / 1e6:g} M", str(ranks), f"{mbit:g}", name]
            lines.append(start + [_cell(place, fitted) for place in places])
    columns = ("coordinates", "ranks a host", "Mbit/s", "one way", *(f"{hosts} hosts" for hosts in HOSTS))
    return _PREDICTIONS + _table(columns, lines)


def _cell(place: Place, fitted: Fitted) -> str:
    grouped = replace(place, hierarchical=place.ranks_per_host > 1)
    dense = min(value for each in (place, grouped) for _, value in _all(each, ("dense",), ENGINES, fitted))
    told = [_fastest(_all(place, _BUILT, (engine,), fitted)) for engine in ("horovod", "mpi")]
    direct = [engine for engine in ENGINES if "direct" in engine]
    return " / ".join([f"{dense:.3g}", *told, _fastest(_all(grouped, _DIRECT, direct, fitted))])


def _all(
    place: Place, exchanges: Sequence[str], engines: Iterable[str], fitted: Fitted
) -> Iterator[tuple[str, float]]:
    """Name and seconds of every exchange on every engine."""
    for engine, exchange in product(engines, exchanges):
        ratio = 1.0 if exchange == "dense" else place.ratio
        name = _SHORT[exchange] + ("2" if ENGINES[engine].levels > 1 else "")
        yield name, seconds(exchange, replace(place, engine=engine, ratio=ratio), fitted)


def _fastest(told: Iterable[tuple[str, float]]) -> str:
    name, value = min(told, key=lambda each: each[1])
    return f"{name} {value:.3g}"


def _breaks(fitted: Fitted) -> str:
    powers = [2**power for power in range(1, 13)]
    lines = []
    for engine, exchange in product(ENGINES, _SHORT):
        found = [_first(engine, exchange, delay, powers, fitted) for delay in DELAYS.values()]
        lines.append([engine, f"`{exchange}`" if exchange != "dense" else exchange, *found])
    head = _BREAKS.format(times=_TIMES, most=powers[-1])
    return head + _table(("engine", "exchange", *DELAYS), lines)


def _first(engine: str, exchange: str, delay: float, powers: Sequence[int], fitted: Fitted) -> str:
    for hosts in powers:
        place = Place(engine, hosts, 1e7, _RATIO, 1000.0, delay)
        own = seconds(exchange, replace(place, ratio=1.0 if exchange == "dense" else _RATIO), fitted)
        if own > _TIMES * min(value for _, value in _all(place, tuple(_SHORT), ENGINES, fitted)):
            return str(hosts)
    return "never"


def _codes() -> str:
    """From how many ranks on the parts of a message are too small to be worth a message each."""
    lines = []
    for coordinates in (1e7, 1e8, 1e9):
        size = 4 * coordinates / _RATIO
        lines.append([f"{coordinates / 1e6:g} M", f"{size / _PACKET:.0f}", f"{size / _SMALLEST:.0f}"])
    columns = ("coordinates", "less than a packet", "levels and checksum a tenth of it")
    return (
        "`sharded` and every direct exchange cut a message into a part for every rank.\n"
        f"From so many ranks on a part is small, at ratio 40:\n\n{_table(columns, lines)}"
    )


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
