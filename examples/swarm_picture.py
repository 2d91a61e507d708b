"""What `swarm_transformer` measured, and its pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLOURS = {"allreduce": "#4d4d4d", "swarm": "#00798c"}
FIRST_SECONDS = 6.0


@dataclass
class Curve:
    """What all ranks did together; lists by moment.

    Attributes:
        label: the method.
        options: of the run.
        seconds: the moments.
        loss: of the mean model on the validation text, nats per character.
        spread: root mean square over the ranks of a model's distance to the mean model.
        steps: local steps done until then, by rank.
        megabytes: sent until then, by rank.
        timeline: by rank, beginning and end of every local step, in seconds.
        meetings: by rank that began them: (partner, began, ended).
    """

    label: str
    options: dict[str, str]
    seconds: list[float]
    loss: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    megabytes: list[list[float]] = field(default_factory=list)
    timeline: list[list[tuple[float, float]]] = field(default_factory=list)
    meetings: list[list[tuple[int, float, float]]] = field(default_factory=list)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Loss over time and bytes and the spread to ``path``; the nodes' first seconds to ``…_timeline`` beside it."""
    from matplotlib import pyplot

    figure, (over_time, over_bytes, spread) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for curve in curves:
        style: dict[str, Any] = {"color": COLOURS[curve.label], "marker": "o", "markersize": 3}
        steps = sum(curve.steps[-1])
        over_time.plot(curve.seconds, curve.loss, label=f"{curve.label}: {curve.loss[-1]:.2f}, {steps} steps", **style)
        over_bytes.plot([max(sent) for sent in curve.megabytes], curve.loss, **style)
        spread.plot(curve.seconds, curve.spread, **style)
    over_time.set(xlabel="seconds", ylabel="validation loss of the mean model")
    over_bytes.set(xlabel="MB sent by the busiest rank", ylabel="validation loss of the mean model")
    spread.set(xlabel="seconds", ylabel="consensus distance", ylim=(0, None))
    over_time.legend(frameon=False)
    for axes in (over_time, over_bytes, spread):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    _draw_timeline(curves, path.with_name(f"{path.stem}_timeline{path.suffix}"))


def _draw_timeline(curves: Sequence[Curve], path: Path) -> None:
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(curves), 1, figsize=(12, 3 * len(curves)), sharex=True, layout="constrained", squeeze=False
    )
    for axes, curve in zip(rows[:, 0], curves, strict=True):
        for rank, steps in enumerate(curve.timeline):
            shown = [(began, ended - began) for began, ended in steps if began < FIRST_SECONDS]
            axes.broken_barh(
                shown, (rank - 0.3, 0.6), facecolors=COLOURS[curve.label], edgecolors="white", linewidth=0.6
            )
        for rank, meetings in enumerate(curve.meetings):
            for partner, began, ended in meetings:
                if began < FIRST_SECONDS:
                    axes.plot([began, ended], [rank, partner], color="#d1495b", linewidth=1.0)
        axes.set(ylabel=f"{curve.label}: rank", yticks=range(len(curve.timeline)), xlim=(0, FIRST_SECONDS))
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1, 0].set(xlabel="seconds; bars: local steps, red: a meeting from the node that began it to its partner")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    results, picture = sys.argv[1:]
    draw([Curve(**curve) for curve in json.loads(Path(results).read_text())], Path(picture))
