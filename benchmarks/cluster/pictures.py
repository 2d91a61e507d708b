"""Bars: what a step is spent on, method by method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cluster.bench import Cell, Row
from benchmarks.cluster.methods import METHODS
from benchmarks.cluster.models import MODELS

_DENSE = ("horovod", "horovod-fp16", "ddp", "ddp-fp16")
_COLORS = {"compute": "0.75", "sketch": "C0", "select": "C2", "memory": "C4", "wire": "C1", "other": "C5"}


def draw(rows: dict[Cell, Row], path: Path) -> None:
    """One panel a model and number of hosts; a bar a method, cut into its parts; a tick at the wire's limit.

    A panel is as wide as what sends fewer bytes needs; a dense bar that is longer has its seconds written in it.
    """
    if not rows:
        return
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "cluster"
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    models = [model for model in MODELS if any(cell.model == model for cell in rows)]
    hosts = sorted({cell.hosts for cell in rows})
    size = (4.5 * len(hosts), 2.4 * len(models) + 0.6)
    figure, panels = pyplot.subplots(len(models), len(hosts), figsize=size, squeeze=False, layout="constrained")
    for line, model in zip(panels, models, strict=True):
        for panel, count in zip(line, hosts, strict=True):
            shown = {cell.method: row for cell, row in rows.items() if (cell.model, cell.hosts) == (model, count)}
            if not shown:
                panel.axis("off")
                continue
            _bars(panel, shown)
            panel.set_title(f"{model}, {count} hosts", fontsize=9)
    figure.supxlabel("seconds a step", fontsize=9)
    handles = [Patch(color=color, label=part) for part, color in _COLORS.items()]
    limit = Line2D([], [], color="black", marker="|", linestyle="", markersize=10, label="wire's limit")
    figure.legend(handles=[*handles, limit], loc="outside upper center", ncols=len(handles) + 1, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _bars(panel: Any, rows: dict[str, Row]) -> None:
    methods = [method for method in reversed(tuple(METHODS)) if method in rows]
    compressed = [method for method in methods if method not in _DENSE]
    width = 1.1 * max(rows[method]["seconds_step"] for method in compressed or methods)
    for place, method in enumerate(methods):
        left = 0.0
        for part, seconds in parts(rows[method]).items():
            panel.barh(place, seconds, left=left, color=_COLORS[part], height=0.7)
            left += seconds
        limit = rows[method]["seconds_compute"] + rows[method]["wire_limit_seconds"]
        panel.plot([limit], [place], color="black", marker="|", markersize=12)
        if left > width:
            panel.text(0.97 * width, place, f"{left:.3g} s", ha="right", va="center", fontsize=7)
    panel.set_xlim(0.0, width)
    panel.set_yticks(range(len(methods)), methods, fontsize=7)
    panel.tick_params(axis="x", labelsize=7)


def parts(row: Row) -> dict[str, float]:
    """What a step is spent on, in seconds; a method that does not tell has only compute and wire."""
    told = {name: row[f"seconds_{name}"] for name in _COLORS if f"seconds_{name}" in row}
    if "wire" not in told:
        return {"compute": row["seconds_compute"], "wire": max(0.0, row["seconds_exchange"])}
    return {**told, "other": max(0.0, row["seconds_step"] - sum(told.values()))}
