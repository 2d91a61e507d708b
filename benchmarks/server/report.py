"""The page and the pictures, from the rows alone: ``python -m benchmarks.server.report``"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.server.curves import real, saga, straggler
from benchmarks.server.rows import Row, read
from benchmarks.server.tables import mean, percent, seeds, table, verdict, where

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks" / "server.md"
INTRODUCTION = """# Training with a server, measured

Rows are in `benchmarks/results/server.json`; `python -m benchmarks.server.report` makes this page of them. Each
experiment is a module of `benchmarks/server` that says how it is started, and whether it runs on real ranks or in one
process on a clock of its own: there the server's store, its rules and its codes are those of real ranks, and only the
messages and the time are not. Real ranks were on one machine of two cores that many other programs used.
[Training with a server](../server.md) says what to make of it.
"""


def write(rows: Sequence[Row], page: Path) -> None:
    """Write the page and its pictures."""
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION]
    for experiment, section in SECTIONS.items():
        mine = [row for row in rows if row["experiment"] == experiment]
        if mine:
            parts.append(section(mine, rows, page.parent))
    page.write_text("\n".join(parts))


def attacks(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """A table of accuracies and one of verdicts for every attack."""
    names = list(dict.fromkeys(row["attack"] for row in mine if row["hostile"]))
    rules = list(dict.fromkeys(row["rule"] for row in mine))
    hostile = sorted({row["hostile"] for row in mine})
    alone = [row["accuracy"] for row in rows if row["experiment"] == "trusted alone"]
    parts = [
        "## Ten workers, some of them hostile\n",
        "`benchmarks.server.attacks`: handwritten digits, 130 images a worker, 137 that the server trusts, a "
        "perceptron of 4810 parameters. Percent of 360 other images that are read correctly at the end, mean of the "
        f"seeds ({seeds(mine)}), by the number of hostile workers. Trained on the trusted images alone: "
        f"{percent(alone)}.\n",
    ]
    for name in names:

        def accuracy(rule: str, count: int, name: str = name) -> str:
            cells = where(mine, rule=rule, hostile=count, **({"attack": name} if count else {}))
            return percent([row["accuracy"] for row in cells])

        head = [name, *map(str, hostile)]
        parts.append(table(head, [[rule, *(accuracy(rule, count) for count in hostile)] for rule in rules]))
    parts.append(
        "Pushes of honest workers that were refused / of hostile ones that were accepted, in percent, for the rules "
        "that judge. Krum, Zeno and ZenoPS leave honest ones out by design.\n"
    )
    parts += [_verdicts(mine, count, names) for count in filter(None, hostile)]
    verdicts = [[rule, verdict(where(mine, rule=rule, hostile=0))] for rule in _judging(mine)]
    return "\n".join([*parts, table(["none hostile", "refused / -"], verdicts)])


def attacks_on_ranks(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """Accuracies beside those of the clock of its own, and verdicts."""
    names = list(dict.fromkeys(row["attack"] for row in mine if row["hostile"]))
    counts = sorted({row["hostile"] for row in mine} - {0})
    simulated = where(rows, experiment="attack")

    def both(rule: str, **values: Any) -> str:
        cells = (where(which, rule=rule, **values) for which in (mine, simulated))
        return " / ".join(percent([row["accuracy"] for row in which]) for which in cells)

    parts = [
        "## Ten workers, some of them hostile, on real ranks\n",
        "`benchmarks.server.on_ranks`: a server and ten workers over MPI, with the data, rules and attacks of above. "
        "A step takes 5 ms, up to a fifth more or less, mostly asleep. Percent read correctly at the end / on the "
        f"clock of above, mean of the seeds ({seeds(mine)}).\n",
    ]
    for count in counts:
        body = [
            [rule, both(rule, hostile=0), *(both(rule, hostile=count, attack=name) for name in names)]
            for rule in dict.fromkeys(row["rule"] for row in mine)
        ]
        parts.append(table([f"{count} of 10 hostile", "none", *names], body))
    parts.append("Honest pushes refused / hostile ones accepted, in percent.\n")
    return "\n".join([*parts, *(_verdicts(mine, count, names) for count in counts)])


def _judging(mine: Sequence[Row]) -> list[str]:
    """The rules that refuse anything where nobody is hostile."""
    return list(dict.fromkeys(row["rule"] for row in where(mine, hostile=0) if row["refused"]))


def _verdicts(mine: Sequence[Row], count: int, names: Sequence[str]) -> str:
    """A table of whom the rules that judge refused, by attack."""
    body = [
        [rule, *(verdict(where(mine, rule=rule, hostile=count, attack=name)) for name in names)]
        for rule in _judging(mine)
    ]
    return table([f"{count} of 10 hostile", *names], body)


def classes(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """Accuracy of the slow worker's classes and of the others."""
    return (
        "## Different data at different speeds\n\n"
        "`benchmarks.server.classes`: one of eight workers is five times slower and the only one that has seen an 8 "
        "or a 9, on a clock of its own: 200 units of time, a step of a fast worker takes one. Percent read correctly "
        f"at the end, mean of the seeds ({seeds(mine)}).\n\n" + _by_class(mine)
    )


def classes_on_ranks(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """The same table."""
    return (
        "## Different data at different speeds, on real ranks\n\n"
        "`benchmarks.server.on_ranks`: the same over MPI, a server and eight workers; a unit of time is 20 ms, mostly "
        f"asleep. Mean of the seeds ({seeds(mine)}).\n\n" + _by_class(mine)
    )


def _by_class(mine: Sequence[Row]) -> str:
    body = []
    for method in dict.fromkeys(row["method"] for row in mine):
        cells = where(mine, method=method)
        body.append([method, *(percent([row[name] for row in cells]) for name in ("rare", "common"))])
    return table(["", "8 and 9", "0 to 7"], body)


def link(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """Updates a second beside the link's limit and beside the dense ones of the same run."""
    body = []
    for row in sorted(mine, key=lambda row: (row["mbit"], row["parameters"], row["seed"])):
        run = {name: row[name] for name in ("mbit", "parameters", "seed")}
        (dense,) = where(mine, **run, code="dense")
        times = row["updates_per_second"] / dense["updates_per_second"]
        line = [f"{row['mbit']:g}", f"{row['parameters']:,}", f"{row['seed']}", row["code"]]
        line += [f"{row['updates_per_second']:.3g}", f"{times:.1f}", f"{row['dense_limit']:.3g}"]
        line += [f"{row['bytes_up'] / 1e3:,.0f} / {row['bytes_down'] / 1e3:,.0f}"]
        body.append([*line, f"{1e3 * row['processor_per_update']:.1f}"])
    head = ["Mbit/s", "parameters", "seed", "code", "updates a second", "times dense", "limit of dense"]
    return (
        "## The server's link\n\n"
        f"`benchmarks.server.link` on the cluster of network namespaces: {mine[0]['workers']} workers push as fast as "
        "they are answered, at ratio 40 both ways but for dense. *ms* are of the server's processor for an update. "
        "With seed 0 little else ran on the two cores, with seed 1 compilers and tests did.\n\n"
        + table([*head, "kB up / down", "ms"], body)
    )


def faults(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """What the others' pushes make of a fault."""
    body = []
    for fault in dict.fromkeys(row["fault"] for row in mine if "told" not in row):
        cells = where(mine, fault=fault)
        line = [fault, *(f"{mean(cells, name):.1f}" for name in ("before", "since"))]
        line += [f"{1e3 * max(row[name] for row in cells):.0f}" for name in ("longest_before", "longest_since")]
        moments = [[row[name] for row in cells if name in row] for name in ("lost", "back")]
        body.append([*line, *(f"{max(values):.1f}" if values else "-" for values in moments)])
    told = [row for row in mine if "told" in row]
    return (
        "## Workers that die, stop and come back\n\n"
        "`benchmarks.server.faults`: a server and four workers over MPI, steps of 50 ms, every one a push, patience "
        "5 s; one worker is hurt between a model and its push. *pushes*: of the three others a second, in the 10 s "
        "before and in the 30 s since. *longest*: between two pushes of one of them, in ms. *lost*, *back*: seconds "
        f"until the server gave it up, and until its next push. Mean or worst of the seeds ({seeds(mine)}).\n\n"
        + table(["", "pushes before", "since", "longest before", "since", "lost", "back"], body)
        + f"\nWhere the server is killed, {min(row['told'] for row in told)} of 4 workers end by an error, the last "
        f"after {max(row['told_after'] for row in told):.1f} s.\n"
    )


SECTIONS: dict[str, Callable[[Sequence[Row], Sequence[Row], Path], str]] = {
    "straggler": straggler,
    "real ranks": real,
    "attack": attacks,
    "attack on ranks": attacks_on_ranks,
    "classes": classes,
    "classes on ranks": classes_on_ranks,
    "saga": saga,
    "link": link,
    "faults": faults,
}


if __name__ == "__main__":
    write(read(), PAGE)
    print(f"see {PAGE}")
