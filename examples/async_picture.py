"""What `async_training` measured, and its picture: ``python examples/async_picture.py PICTURE.png RESULTS.json …``"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLOURS = {
    "allreduce": "#4d4d4d",
    "local": "#a6a6a6",
    "swarm": "#edae49",
    "async": "#00798c",
    "async, 1/20": "#66c2cd",
    "fedasync": "#d1495b",
    "fedat": "#8d5a97",
}


@dataclass
class Curve:
    """What all ranks did together; lists by moment.

    Attributes:
        label: the method.
        options: of the run.
        seconds: the moments.
        loss: of the served or the mean model on the validation text, nats per character.
        megabytes: sent and received until then by the server, or else by the busiest worker.
        steps: of each worker at the end.
    """

    label: str
    options: dict[str, str]
    seconds: list[float]
    loss: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def read(path: Path) -> list[Curve]:
    """The curves of a file."""
    return [Curve(**curve) for curve in json.loads(path.read_text())]


def draw(runs: Sequence[Sequence[Curve]], path: Path) -> None:
    """A column for each run: loss over seconds, and over megabytes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(runs), figsize=(4.5 * len(runs), 7), sharey="col", layout="constrained", squeeze=False
    )
    for (over_time, over_bytes), curves in zip(axes.T, runs, strict=True):
        for curve in curves:
            style = {"color": COLOURS[curve.label], "marker": "o", "markersize": 2.5}
            over_time.plot(curve.seconds, curve.loss, label=f"{curve.label}: {curve.loss[-1]:.2f}", **style)
            over_bytes.plot(curve.megabytes, curve.loss, **style)
        over_time.set(xlabel="seconds", title=f"one worker {float(curves[0].options['straggler']):g} x slower")
        over_bytes.set(xlabel="MB of the server, or else the busiest worker", xscale="log")
        over_time.legend(frameon=False, fontsize="small")
        for plot in (over_time, over_bytes):
            plot.set(ylabel="validation loss")
            plot.grid(alpha=0.25)
            plot.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    draw([read(Path(name)) for name in sys.argv[2:]], Path(sys.argv[1]))
