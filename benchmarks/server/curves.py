"""The sections of the page that have pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.server.rows import Row
from benchmarks.server.tables import mean, seeds, table, where

COLOURS = ("#00798c", "#d1495b", "#edae49", "#8d5a97", "#4d4d4d", "#66a182", "#9c6644")


def straggler(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """When each method is where the allreduce ends, and its loss over time and bytes."""
    draw(mine, folder / "server_straggler.png")
    factors, body = sorted({row["factor"] for row in mine}), []
    for method in dict.fromkeys(row["method"] for row in mine):
        line = [method, f"{where(mine, method=method)[0]['rate']:g}"]
        for factor in factors:
            curve, megabytes = _mean_curve(where(mine, method=method, factor=factor))
            line += [f"{curve[-1]:.3f}", _reached(mine, curve, factor), f"{megabytes:.1f}"]
        body.append(line)
    head = ["", "rate", *(f"{name}, {factor:g} x" for factor in factors for name in ("loss", "time", "MB"))]
    return (
        "## One worker is slow\n\n"
        "`benchmarks.server.straggler`, on a clock of its own: eight workers, 200 units of time, a step of a fast one "
        "takes one, messages take none. *loss*: on 360 test images at the end. *time*: until the method was where the "
        "allreduce ended, in percent of the allreduce's time. *MB*: sent and received by the server, or by one "
        f"worker where there is none. Mean of the seeds ({seeds(mine)}).\n\n"
        + table(head, body)
        + "\n![loss over time and bytes](server_straggler.png)\n"
    )


def real(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """The same on real ranks."""
    draw(mine, folder / "server_ranks.png")
    factors, body = sorted({row["factor"] for row in mine}), []
    for method in dict.fromkeys(row["method"] for row in mine):
        line = [method]
        for factor in factors:
            cells = where(mine, method=method, factor=factor)
            curve, megabytes = _mean_curve(cells)
            steps = statistics.fmean(sum(row["steps"]) for row in cells)
            line += [f"{curve[-1]:.2f}", _reached(mine, curve, factor), f"{megabytes:.0f}", f"{steps:.0f}"]
        body.append(line)
    head = ["", *(f"{name}, {factor:g} x" for factor in factors for name in ("loss", "time", "MB", "steps"))]
    return (
        "## One worker is slow, on real ranks\n\n"
        "`benchmarks.server.real`: a server and four workers over MPI, a character model of 40 thousand parameters, a "
        "minute each; a step takes half a second, mostly asleep. *time*, *MB*: as above; *steps*: of all workers. "
        f"Mean of the seeds ({seeds(mine)}).\n\n" + table(head, body) + "\n![the same](server_ranks.png)\n"
    )


def draw(mine: Sequence[Row], picture: Path) -> None:
    """A column for each factor: the loss over time, and over the bytes, which go out evenly."""
    factors = sorted({row["factor"] for row in mine})
    size = (4.5 * len(factors), 7)
    figure, axes = plt.subplots(2, len(factors), figsize=size, layout="constrained", squeeze=False, sharey="col")
    for factor, over_time, over_bytes in zip(factors, *axes, strict=True):
        for colour, method in zip(COLOURS, dict.fromkeys(row["method"] for row in mine), strict=False):
            curve, megabytes = _mean_curve(where(mine, method=method, factor=factor))
            share = torch.arange(1, len(curve) + 1) / len(curve)
            over_time.semilogy(100.0 * share, curve, color=colour, label=method, linewidth=1.4)
            over_bytes.loglog(megabytes * share, curve, color=colour, linewidth=1.4)
        over_time.set(xlabel="percent of the time", ylabel="loss", title=f"one worker {factor:g} x slower")
        over_bytes.set(xlabel="MB", ylabel="loss")
        for plot in (over_time, over_bytes):
            plot.grid(alpha=0.25)
            plot.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize="small")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _mean_curve(rows: Sequence[Row]) -> tuple[list[float], float]:
    """Of the losses, and of the megabytes at the end."""
    losses = [statistics.fmean(losses) for losses in zip(*(row["losses"] for row in rows), strict=True)]
    return losses, mean(rows, "megabytes")


def _reached(mine: Sequence[Row], curve: Sequence[float], factor: float) -> str:
    """The percentage of the moments until a curve is where the allreduce ends."""
    target = _mean_curve(where(mine, method="allreduce", factor=factor))[0][-1]
    moment = next((moment for moment, loss in enumerate(curve, start=1) if loss <= target), None)
    return "not" if moment is None else f"{100 * moment // len(curve)}"


def saga(mine: Sequence[Row], rows: Sequence[Row], folder: Path) -> str:
    """Distances over time, and the line through them."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    body = []
    labels = dict.fromkeys((row["method"], row["workers"]) for row in mine)
    for colour, (method, workers) in zip(COLOURS, labels, strict=False):
        cells, label = where(mine, method=method, workers=workers), f"{method}, {workers} workers"
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
        f"takes 10 ms, asleep. Mean of the seeds ({seeds(mine)}).\n\n"
        + table(["", "seconds", "squared distance then", "digits a second", "R² of the line"], body)
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
