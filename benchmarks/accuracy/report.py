"""The page and the plots, from the rows alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.accuracy.against import gap
from benchmarks.accuracy.methods import BY_RATIO, LOW_RANK

Row = dict[str, Any]
_DRAWN = (
    ("dense", 1.0, 1.0),
    ("auto, dropped in", 40.0, 1.0),
    ("sketch, dropped in", 40.0, 1.0),
    ("topk", 40.0, 1.0),
    ("powersgd, anticipate", 1.0, 1.0),
    ("local SGD", 40.0, 1.0),
)
"""What the pictures show; more lines would be too many."""

INTRODUCTION = """# Accuracy at equal bytes

Validation loss at the end of training, at the hyper-parameters tuned for the dense run, with {ranks} simulated ranks,
each with a batch, a model and an optimizer of its own, through the real exchange in one process (`make accuracy`; rows
in `benchmarks/results/accuracy.json`). On as many real ranks the same numbers come out, to rounding:
`mpirun -np 8 python -m benchmarks.accuracy.ranks TASK METHOD RATIO`, and a test compares the two.
`python -m benchmarks.accuracy --quick` (one seed, ratio 40, half of the steps) takes ten minutes on two cores, the
whole table hours, in pieces of any length: a row that is there is not run again.

*Setting* is the ratio asked for, or PowerSGD's rank; *ratio* is dense bytes over bytes sent over the whole run, and
*bytes* what a rank sent for each parameter in all of it. No method has a dense warm-up here, which would send more in
a few steps than in all the others. *Gap* is the loss above a dense run of the same seed and length, in percent;
negative is better than dense. Mean over seeds, and the spread between the best and the worst. Where *lr* is given,
the learning rate was so many times the one tuned for dense.

*Dropped in* is what one argument brings, `Compression.auto(ratio=…)` for one, beside dense at the same learning rate.
*By hand* takes more than that: there methods may have a rate of their own, and dense has the best of those that it was
tried at with all seeds. The rows "sketch" and "sketch, anticipate" by hand were measured with the sketch's former
geometry, which found less (see the design page); "sketch, dropped in" has the present one. Most rows of `sharded` are
of a code with larger levels: 18 bytes in each, at 400 a seventeenth of it, are values today.

"anticipate" is `error_feedback=Anticipate(coefficient=0.6)`, the default with SGD, and with Adam when these rows were
measured: 1 today, in what is dropped in. Then norms and biases are compressed like everything else (`dense_below=0`);
"sketch, anticipate" sends three quarters of its values in turn (`in_turn=0.75`), which helps it with anticipation and
harms it without. "factored" is `Anticipate(second_moments=FactoredMoments())`, for Adam alone; what it measures are
rows and columns, much of matrices as small as these, so its ratio is below what was asked for. "local SGD" meets
every 8 steps, with `sharded` at an eighth of the ratio asked for, so that 10 comes out as about 42; "4 steps,
anticipate" is `LocalSGD(period=4, anticipate=0.6)`. DeMo (arXiv 2411.19870) and SparseLoCo (arXiv 2508.15706) are
methods of others, written from their papers (`benchmarks/accuracy/rivals.py`), an allgather counted as `W - 1`
messages and every position and value by its bits.

"mixed by dct" or "by hadamard" chooses coefficients in place of entries, and "soft sign" is `hvd_sketch.SoftSign`
over `Compression.mixed`: see [the recipe](../recipe.md). "soft sign, uncompressed" is its step alone; what compression
costs there is the distance to that row.

These models are small. [At a real size](gpu.md#accuracy-at-a-real-size), on a GPU, no training was long enough yet.
"""


def write_page(rows: list[Row], folder: Path) -> None:
    """Write ``accuracy.md`` and one picture a task into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = ", ".join(str(number) for number in sorted({row["ranks"] for row in rows}))
    parts = [INTRODUCTION.format(ranks=ranks)]
    for task in dict.fromkeys(row["task"] for row in rows):
        for steps in sorted({row["steps"] for row in rows if row["task"] == task}):
            mine = [row for row in rows if row["task"] == task and row["steps"] == steps]
            picture = f"accuracy-{task}-{steps}.png"
            _plot(mine, folder / picture)
            title = f"## {task}, {steps} steps"
            parts.append(f"{title}\n\n{_tables(mine)}\n\n![loss over steps and bytes]({picture})\n")
    (folder / "accuracy.md").write_text("\n".join(parts))


def _tables(rows: list[Row]) -> str:
    """As dropped in and by hand, each with the dense run, and the methods at each ratio, the least gap first."""
    parts = []
    for way in ("dropped in", "by hand"):
        mine = [row for row in rows if row["way"] == way]
        if mine:
            same = [row for row in rows if _kind(row) == ("dense", 1.0, 1.0) and way == "dropped in"]
            dense = [{**row, "dense_loss": row["final_loss"]} for row in same]
            parts.append(f"{way.capitalize()}:\n\n{_table(dense + mine)}\n\n{_order(mine)}")
    return "\n\n".join(parts)


def _order(rows: list[Row]) -> str:
    """Every method at the best of its learning rates, the lowest mean gap first."""
    by_setting: dict[float, dict[str, list[tuple[float, float]]]] = {}
    for kind in {_kind(row) for row in rows if "refused" not in row and row["method"] in BY_RATIO}:
        gaps = [math.inf if row["diverged"] else gap(row) for row in rows if _kind(row) == kind]
        method, setting, scale = kind
        by_setting.setdefault(setting, {}).setdefault(method, []).append((statistics.mean(gaps), scale))
    lines = []
    for setting, methods in sorted(by_setting.items()):
        best = sorted((min(rates), method) for method, rates in methods.items() if setting > 1.0)
        told = [f"{_named(method, scale)} ({mean:+.1f} %)" for (mean, scale), method in best]
        lines += [f"Ratio {setting:g}, from the best: {', '.join(told)}."] if told else []
    return "\n".join(lines)


def _named(method: str, scale: float) -> str:
    return method if scale == 1.0 else f"{method}, lr {scale:g}"


def _table(rows: list[Row]) -> str:
    lines = [
        "| method | setting | ratio | bytes | loss | gap % | spread | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in sorted({_kind(row) for row in rows}, key=_rank):
        group = [row for row in rows if _kind(row) == kind]
        name, setting = _named(kind[0], kind[2]), kind[1]
        if "refused" in group[0]:
            lines.append(f"| {name} | {setting:g} | refused: the dense part alone is more | | | | | |")
            continue
        sent = f"{group[0]['ratio']:.1f} | {group[0]['bytes_per_parameter']:.0f}"
        if any(row["diverged"] for row in group):
            lines.append(f"| {name} | {setting:g} | {sent} | diverged | | | {len(group)} |")
            continue
        losses = [row["final_loss"] for row in group]
        gaps = [gap(row) for row in group]
        spread = f"{max(losses) - min(losses):.3f}" if len(group) > 1 else "-"
        lines.append(
            f"| {name} | {setting:g} | {sent} | {statistics.mean(losses):.3f} | "
            f"{statistics.mean(gaps):+.1f} | {spread} | {len(group)} |"
        )
    return "\n".join(lines)


def _kind(row: Row) -> tuple[str, float, float]:
    return row["method"], row["setting"], row["lr_scale"]


def _rank(kind: tuple[str, float, float]) -> tuple[int, float, float]:
    """Methods in the order in which they are declared, each from its lowest ratio on."""
    method, setting, scale = kind
    return ["dense", *BY_RATIO, *LOW_RANK].index(method), -setting if method in LOW_RANK else setting, scale


def _plot(rows: list[Row], file: Path) -> None:
    figure, (by_steps, by_bytes) = plt.subplots(1, 2, figsize=(13, 4.6), sharey=True, layout="constrained")
    first = min(row["seed"] for row in rows)
    drawn = {kind: row for row in rows if row["seed"] == first and (kind := _kind(row)) in _DRAWN}
    for number, row in enumerate(drawn[kind] for kind in _DRAWN if kind in drawn):
        steps, sent, losses = zip(*row["losses"], strict=True)
        label = row["method"] if row["method"] == "dense" else f"{row['method']} {row['setting']:g}"
        style: dict[str, Any] = {"color": f"C{number}"} if number else {"color": "black", "linewidth": 2.0}
        by_steps.plot(steps, losses, label=label, **style)
        by_bytes.plot([count / 1e6 for count in sent], losses, **style)
    finite = [loss for row in rows if not row.get("refused") for *_, loss in row["losses"] if loss < 10]
    by_steps.set(
        xlabel="steps", ylabel="validation loss", ylim=(min(finite) * 0.97, sorted(finite)[-len(finite) // 8])
    )
    by_bytes.set(xlabel="MB sent per rank", xscale="log")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)
