"""What `compare_methods` measured, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from compared_methods import METHODS
from harness import Record
from rich.console import Console
from rich.table import Table

COLOURS = ("#4d4d4d", "#edae49", "#b8860b", "#8c6d31", "#d1495b", "#8f2d56", "#00798c", "#30638e", "#6a994e")
TOP = {"digits": 3.0, "text": 2.9}  # of the picture, in nats


def show(records: Sequence[Record]) -> None:
    """Print the last loss of every method: the median over the seeds and, in brackets, the least and the largest."""
    table = Table("task", "method", "steps", "validation loss", "MB sent per rank", "dense over sent")
    for task, label, runs in _grouped(records):
        last = [run.values[-1] for run in runs]
        spread = f"{statistics.median(last):.4g} ({min(last):.4g} … {max(last):.4g})"
        sent = statistics.mean(run.bytes[-1] for run in runs) / 1e6
        table.add_row(task, label, f"{runs[0].steps[-1]}", spread, f"{sent:.2f}", f"{runs[0].ratio:.1f}")
    Console(width=119).print(table)


def draw(path: Path, records: Sequence[Record]) -> None:
    """Draw the loss over steps and over bytes; the line is the median over the seeds, the band all of them.

    The start of the training, and what diverges, is above the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _, _ in _grouped(records)))
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(10, 3 * len(tasks)), layout="constrained", squeeze=False)
    for task, label, runs in _grouped(records):
        values = list(zip(*(run.values for run in runs), strict=True))
        middle, low, high = ([pick(at_step) for at_step in values] for pick in (statistics.median, min, max))
        sent = [count / 1e6 for count in runs[0].bytes]
        colour = COLOURS[list(METHODS).index(label)]
        for ax, along in zip(axes[tasks.index(task)], (runs[0].steps, sent), strict=True):
            ax.plot(along, middle, color=colour, linewidth=1.5, label=label)
            ax.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
    for task, (over_steps, over_bytes) in zip(tasks, axes, strict=True):
        over_steps.set(xlabel="steps", ylabel=f"{task}: validation loss")
        over_bytes.set(xlabel="MB sent per rank", xscale="log")
        least = min(min(run.values) for run in records if run.settings["task"] == task)
        for ax in (over_steps, over_bytes):
            ax.set(yscale="log", ylim=(0.98 * least, TOP[task]))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}" if TOP[task] < 10 * least else "")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=76)
    pyplot.close(figure)


def _grouped(records: Sequence[Record]) -> list[tuple[str, str, list[Record]]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.settings["task"], record.label), []).append(record)
    return [(task, label, runs) for (task, label), runs in groups.items()]
