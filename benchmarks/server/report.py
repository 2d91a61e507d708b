"""The page and the pictures, from the rows alone: ``python -m benchmarks.server.report``"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.server.rows import Row, read

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks" / "server.md"
COLOURS = ("#00798c", "#d1495b", "#edae49", "#8d5a97", "#4d4d4d", "#66a182", "#9c6644")
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
        f"seeds ({_seeds(mine)}), by the number of hostile workers. Trained on the trusted images alone: "
        f"{_percent(alone)}.\n",
    ]
    for name in names:

        def accuracy(rule: str, count: int, name: str = name) -> str:
            cells = _where(mine, rule=rule, hostile=count, **({"attack": name} if count else {}))
            return _percent([row["accuracy"] for row in cells])

        head = [name, *map(str, hostile)]
        parts.append(_table(head, [[rule, *(accuracy(rule, count) for count in hostile)] for rule in rules]))
    parts.append(
        "Pushes of honest workers that were refused / of hostile ones that were accepted, in percent, for the rules "
        "that judge. Krum, Zeno and ZenoPS leave honest ones out by design.\n"
    )
    parts += [_verdicts(mine, count, names) for count in filter(None, hostile)]
    verdicts = [[rule, _verdict(_where(mine, rule=rule, hostile=0))] for rule in _judging(mine)]
    return "\n".join([*parts, _table(["none hostile", "refused / -"], verdicts)])


def attacks_on_ranks(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """A table of accuracies and one of verdicts, beside those of the clock of its own."""
    names = list(dict.fromkeys(row["attack"] for row in mine if row["hostile"]))
    (count,) = {row["hostile"] for row in mine if row["hostile"]}
    columns: list[Row] = [{"hostile": 0}, *({"hostile": count, "attack": name} for name in names)]
    simulated = _where(rows, experiment="attack")

    def both(rule: str, column: Row) -> str:
        cells = (_where(which, rule=rule, **column) for which in (mine, simulated))
        return " / ".join(_percent([row["accuracy"] for row in which]) for which in cells)

    rules = dict.fromkeys(row["rule"] for row in mine)
    return (
        "## Ten workers, some of them hostile, on real ranks\n\n"
        "`benchmarks.server.on_ranks`: a server and ten workers over MPI, with the data, rules and attacks of above. "
        "A step takes 5 ms, up to a fifth more or less, mostly asleep. Percent read correctly at the end / on the "
        f"clock of above, without hostile workers and with {count}, mean of the seeds ({_seeds(mine)}).\n\n"
        + _table(
            [f"{count} of 10 hostile", "none", *names], [[rule, *(both(rule, c) for c in columns)] for rule in rules]
        )
        + "\nHonest pushes refused / hostile ones accepted, in percent.\n\n"
        + _verdicts(mine, count, names)
    )


def _judging(mine: Sequence[Row]) -> list[str]:
    """The rules that refuse anything where nobody is hostile."""
    return list(dict.fromkeys(row["rule"] for row in _where(mine, hostile=0) if row["refused"]))


def _verdicts(mine: Sequence[Row], count: int, names: Sequence[str]) -> str:
    """A table of whom the rules that judge refused, by attack."""
    body = [
        [rule, *(_verdict(_where(mine, rule=rule, hostile=count, attack=name)) for name in names)]
        for rule in _judging(mine)
    ]
    return _table([f"{count} of 10 hostile", *names], body)


def straggler(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """When each method is where the allreduce ends, and both losses over time."""
    factors, methods = sorted({row["factor"] for row in mine}), list(dict.fromkeys(row["method"] for row in mine))
    figure, axes = plt.subplots(1, len(factors), figsize=(4.5 * len(factors), 4), layout="constrained", squeeze=False)
    body = {method: [f"{_where(mine, method=method)[0]['rate']:g}"] for method in methods}
    for factor, plot in zip(factors, axes[0], strict=True):
        curves = {method: _mean_curve(_where(mine, method=method, factor=factor)) for method in methods}
        for colour, (method, curve) in zip(COLOURS, curves.items(), strict=False):
            share = [100.0 * (moment + 1) / len(curve) for moment in range(len(curve))]
            plot.semilogy(share, curve, color=colour, label=method, linewidth=1.4)
            megabytes = statistics.fmean(row["megabytes"] for row in _where(mine, method=method, factor=factor))
            body[method] += [f"{curve[-1]:.3f}", _reached(curve, curves["allreduce"][-1]), f"{megabytes:.1f}"]
        plot.set(xlabel="percent of the time", ylabel="loss", title=f"one worker {factor:g} x slower")
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize="small")
    figure.savefig(folder / "server_straggler.png", dpi=110)
    plt.close(figure)
    head = ["", "rate", *(f"{name}, {factor:g} x" for factor in factors for name in ("loss", "time", "MB"))]
    return (
        "## One worker is slow\n\n"
        "`benchmarks.server.straggler`, on a clock of its own: eight workers, 200 units of time, a step of a fast one "
        "takes one, messages take none. *loss*: on 360 test images at the end. *time*: until the method was where the "
        "allreduce ended, in percent of the allreduce's time. *MB*: sent and received by the server, or by one "
        f"worker where there is none. Mean of the seeds ({_seeds(mine)}).\n\n"
        + _table(head, [[method, *cells] for method, cells in body.items()])
        + "\n![loss over time](server_straggler.png)\n"
    )


def real(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """When each method is where the allreduce ends, on real ranks."""
    factors, body = sorted({row["factor"] for row in mine}), []
    for method in dict.fromkeys(row["method"] for row in mine):
        line = [method]
        for factor in factors:
            curve = _mean_curve(_where(mine, method=method, factor=factor))
            target = _mean_curve(_where(mine, method="allreduce", factor=factor))[-1]
            cells = _where(mine, method=method, factor=factor)
            megabytes = statistics.fmean(row["megabytes"] for row in cells)
            steps = statistics.fmean(sum(row["steps"]) for row in cells)
            line += [f"{curve[-1]:.2f}", _reached(curve, target), f"{megabytes:.0f}", f"{steps:.0f}"]
        body.append(line)
    head = ["", *(f"{name}, {factor:g} x" for factor in factors for name in ("loss", "time", "MB", "steps"))]
    return (
        "## One worker is slow, on real ranks\n\n"
        "`benchmarks.server.real`: a server and four workers over MPI, a character model of 40 thousand parameters, a "
        "minute each; a step takes half a second, mostly asleep. *time*, *MB*: as above; *steps*: of all workers. "
        f"Mean of the seeds ({_seeds(mine)}).\n\n" + _table(head, body)
    )


def _mean_curve(rows: Sequence[Row]) -> list[float]:
    return [statistics.fmean(losses) for losses in zip(*(row["losses"] for row in rows), strict=True)]


def _reached(curve: Sequence[float], target: float) -> str:
    """The percentage of the moments until a loss was reached."""
    moment = next((moment for moment, loss in enumerate(curve, start=1) if loss <= target), None)
    return "not" if moment is None else f"{100 * moment // len(curve)}"


def classes(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """Accuracy of the slow worker's classes and of the others."""
    return (
        "## Different data at different speeds\n\n"
        "`benchmarks.server.classes`: one of eight workers is five times slower and the only one that has seen an 8 "
        "or a 9, on a clock of its own: 200 units of time, a step of a fast worker takes one. Percent read correctly "
        f"at the end, mean of the seeds ({_seeds(mine)}).\n\n" + _by_class(mine)
    )


def classes_on_ranks(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """The same table."""
    return (
        "## Different data at different speeds, on real ranks\n\n"
        "`benchmarks.server.on_ranks`: the same over MPI, a server and eight workers; a unit of time is 20 ms, mostly "
        f"asleep. Mean of the seeds ({_seeds(mine)}).\n\n" + _by_class(mine)
    )


def _by_class(mine: Sequence[Row]) -> str:
    body = []
    for method in dict.fromkeys(row["method"] for row in mine):
        cells = _where(mine, method=method)
        body.append([method, *(_percent([row[name] for row in cells]) for name in ("rare", "common"))])
    return _table(["", "8 and 9", "0 to 7"], body)


def saga(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """Distances over time, and the line through them."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    body = []
    labels = dict.fromkeys((row["method"], row["workers"]) for row in mine)
    for colour, (method, workers) in zip(COLOURS, labels, strict=False):
        cells, label = _where(mine, method=method, workers=workers), f"{method}, {workers} workers"
        for row in cells:
            seconds, updates, squared = zip(*row["points"], strict=True)
            style: dict[str, Any] = {"color": colour, "label": label if row is cells[0] else None, "linewidth": 1.2}
            axes[0].semilogy(seconds, squared, **style)
            if any(updates):
                axes[1].semilogy(updates, squared, **style)
        body.append([label, *_lines(cells)])
    for plot, name in zip(axes, ("seconds", "changes of the server's model"), strict=True):
        plot.set(xlabel=name, ylabel="squared distance to the minimiser", ylim=(1e-31, None))
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(folder / "server_saga.png", dpi=110)
    plt.close(figure)
    return (
        "## ADSAGA\n\n"
        "`benchmarks.server.saga`: least squares, 240 components, 20 dimensions, float64; a component's gradient "
        f"takes 10 ms, asleep. Mean of the seeds ({_seeds(mine)}).\n\n"
        + _table(["", "seconds", "squared distance then", "digits a second", "R² of the line"], body)
        + "\n![distance over time and over changes](server_saga.png)\n"
    )


def _lines(cells: Sequence[Row]) -> list[str]:
    """The last distance, and slope and fit of its logarithm over time, down to 1e-20."""
    slopes, fits, last = [], [], []
    for row in cells:
        kept = [(seconds, math.log10(squared)) for seconds, _, squared in row["points"] if squared > 1e-20]
        moments, logarithms = torch.tensor(kept, dtype=torch.float64).unbind(1)
        centred = moments - moments.mean()
        slopes.append(-float((centred * logarithms).sum() / centred.square().sum()))
        fits.append(float(torch.corrcoef(torch.stack([moments, logarithms]))[0, 1]) ** 2)
        last.append(row["points"][-1][2])
    return [
        f"{max(row['points'][-1][0] for row in cells):.0f}",
        f"{statistics.geometric_mean(last):.1e}",
        f"{statistics.fmean(slopes):.2f}",
        f"{statistics.fmean(fits):.3f}",
    ]


def link(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """Updates a second beside the link's limit."""
    body = []
    for row in sorted(mine, key=lambda row: (row["mbit"], row["parameters"])):
        (dense,) = _where(mine, mbit=row["mbit"], parameters=row["parameters"], code="dense")
        body.append(
            [
                f"{row['mbit']:g}",
                f"{row['parameters']:,}",
                row["code"],
                f"{row['updates_per_second']:.3g}",
                f"{row['updates_per_second'] / dense['updates_per_second']:.1f}",
                f"{row['dense_limit']:.3g}",
                f"{row['bytes_up'] / 1e3:,.0f} / {row['bytes_down'] / 1e3:,.0f}",
                f"{1e3 * row['processor_per_update']:.1f}",
            ]
        )
    head = ["Mbit/s", "parameters", "code", "updates a second", "times dense", "limit of dense", "kB up / down", "ms"]
    return (
        "## The server's link\n\n"
        f"`benchmarks.server.link` on the cluster of network namespaces: {mine[0]['workers']} workers push as fast as "
        "they are answered, at ratio 40 both ways but for dense. *ms* are of the server's processor for an update.\n\n"
        + _table(head, body)
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
}


def _where(rows: Iterable[Row], **values: Any) -> list[Row]:
    return [row for row in rows if values.items() <= row.items()]


def _seeds(rows: Iterable[Row]) -> str:
    return ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(shares):.1f}" if shares else "-"


def _verdict(rows: Sequence[Row]) -> str:
    refused = [row["refused"] for row in rows]
    missed = [row["missed"] for row in rows if not math.isnan(row["missed"])]
    return f"{_percent(refused)} / {_percent(missed)}"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    write(read(), PAGE)
    print(f"see {PAGE}")
