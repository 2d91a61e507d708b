"""``python -m benchmarks.gpu.page``: ``docs/benchmarks/gpu.md``, from the rows alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.prose import CORRECT, GOAL_LEAD, HEAD, LARGE, MISSING, PEERS, STEPS, TRAINING

Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "gpu.md"
PASSES = {"sketch": 6.5, "sharded": 6.0, "topk": 6.0, "powersgd": 9.0, "stride": 5.0, "dense": 3.0}
"""Over the vector, that a whole step of an exchange aims at."""
GOAL_SECONDS, GOAL_AHEAD_SECONDS = 1.5e-3, 3e-3
"""Of a step's own work at 100 M coordinates, without `Anticipate` and with it."""
BESIDE = {
    ("add", "hvd_sketch"): [("add", "classic, bincount")],
    ("top_k", "hvd_sketch"): [("top_k", "classic, of all estimates")],
    ("heaviest", "hvd_sketch, 1 shard"): [("topk", "torch.topk"), ("topk", "DGC"), ("topk", "torch.sort")],
    ("step", "dense"): [("backward", "ddp")],
    ("step", "sharded"): [("backward", "ddp, bf16 hook")],
    ("step", "powersgd"): [("backward", "ddp, PowerSGD hook")],
}
"""Of a measurement of ours, what others do in its place."""
PARTS = {
    "Parts": ("stage", "heaviest", "encode", "decode", "add", "advance", "top_k", "common_share", "moments"),
    "Adam, alone and with anticipation around it": ("optimizer", "ahead"),
    "The device": ("copy", "norm", "launch", "wait"),
}


class Results(NamedTuple):
    """The rows of the runs on a GPU, of the training of two ranks, and of the accuracy at a real size."""

    runs: list[list[Row]]
    training: list[Row]
    large: list[Row]

    def latest(self, op: str) -> list[Row]:
        """The measurements of that kind, of the last run that has any."""
        return next((rows for run in reversed(self.runs) if (rows := _of(run, op))), [])


_RUNS = ("first", "second", "third", "fourth", "fifth")
_COMPARED = 3
"""Runs, the last ones, that stand beside each other."""


def read() -> Results:
    """All rows that are kept."""
    runs = [_rows(f"gpu-{name}") for name in _RUNS[:-1]]
    return Results([*runs, _rows("gpu")], _rows("gpu-training"), _rows("accuracy-large"))


def _rows(name: str) -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / f"{name}.json").read_text())
    return rows


def page(results: Results) -> str:
    """The whole text."""
    (step, *_), head = results.latest("step"), _head(results)
    parts = [head, GOAL_LEAD, _goals(results), STEPS.format(ranks=step["ranks"], ratio=step["ratio"])]
    parts += [_steps(results), PEERS, _beside(results), *_parts(results), _correct(results)]
    parts += [LARGE.format(**_training_facts(results.large)), large_table(results.large)]
    parts += [TRAINING, _trained(results.training), MISSING]
    return "\n".join(parts) + "\n"


def _head(results: Results) -> str:
    facts = [next(row for row in rows if row["op"] == "facts") for rows in results.runs]
    runs = [f"| {name} | {row['when']} | {row['code']} |" for name, row in zip(_RUNS, facts, strict=True)]
    devices = sorted({row["device"] for rows in results.runs for row in rows if row.get("device")})
    table = "\n".join(["| run | ended | version of the code |", "|---|---|---|", *runs])
    software = ", ".join(each for each in facts[-1]["note"].split(", ") if not each.startswith("host "))
    return HEAD.format(devices=", ".join(devices), facts=software, runs=table)


def _goals(results: Results) -> str:
    """A step's own work at 100 M against the aim."""
    lines = _header(["at 100 M", "ms", "goal", "times the goal", "host ms", "kernels ms", "bound by"], texts=1)
    own = {row["impl"]: row for row in results.latest("step") if _order(row) == 8}
    nothing = {"seconds": 0.0, "host_seconds": 0.0}
    lines += [_goal(impl, row, nothing, GOAL_SECONDS, f"{1e3 * _busy(row):.2f}") for impl, row in own.items()]
    whole = {row["impl"]: row for row in results.latest("optimizer") if _order(row) == 8}
    plain = whole.pop("adamw")
    lines += [_goal(f"{impl}, less Adam", row, plain, GOAL_AHEAD_SECONDS) for impl, row in whole.items()]
    return "\n".join(lines)


def _goal(impl: str, row: Row, less: Row, goal: float, kernels: str = "-") -> str:
    own, host = (row[name] - less[name] for name in ("seconds", "host_seconds"))
    bound = "the host's launches" if row["host_seconds"] > 0.9 * row["seconds"] else "the device"
    cells = [impl, f"{1e3 * own:.2f}", f"{1e3 * goal:g}", f"{own / goal:.1f}", f"{1e3 * host:.2f}"]
    return _line([*cells, kernels, bound])


def _busy(row: Row) -> float:
    """Seconds of all kernels, or of the longest where a row has not their sum."""
    return float(row.get("busy_seconds", sum(micros for *_, micros in row["kernels"]) / 1e6))


def _steps(results: Results) -> str:
    names = [f"{name} ms" for name in _RUNS[-_COMPARED:]]
    head = ["exchange", "coordinates", *names, "passes", "goal", "host ms"]
    lines = _header([*head, "waits", "launches", "peak GB", "peak bytes a coordinate"], texts=1)
    compared = results.runs[-_COMPARED:]
    runs = [{(row["impl"], row["d"]): row for row in _of(rows, "step")} for rows in compared]
    kinds = list(PASSES)
    for impl, d in sorted(runs[-1], key=lambda key: (kinds.index(key[0].split(",")[0]), key)):
        row = runs[-1][impl, d]
        before = [_ms(run.get((impl, d))) for run in runs]
        peak = row["peak_bytes"] or 0
        cells = [impl, _millions(row), *before, f"{row['passes']:.1f}", f"{PASSES[impl.split(',')[0]]:g}"]
        cells += [_ms(row, "host_seconds"), _number(row, "waits"), _number(row, "launches")]
        lines.append(_line([*cells, f"{peak / 1e9:.2f}", f"{peak / d:.1f}"]))
    met = sum(row["passes"] <= PASSES[row["impl"].split(",")[0]] for row in runs[-1].values())
    return "\n".join([*lines, f"\nOf these {len(runs[-1])} rows, {met} reach their passes."])


def _beside(results: Results) -> str:
    """Ours against what others do, at about the same size."""
    lines = _header(["ours", "coordinates", "ms", "GB", "theirs", "ms", "GB", "theirs / ours"], texts=1)
    for (op, impl), others in BESIDE.items():
        for row in (row for row in results.latest(op) if row.get("impl") == impl):
            for their in (each for rows in results.runs for each in rows if _is_beside(each, others, row)):
                times = f"{their['seconds'] / row['seconds']:.2f}"
                cells = [f"{op}, {impl}", _millions(row), _ms(row), _gb(row), f"{their['op']}, {their['impl']}"]
                lines.append(_line([*cells, _ms(their), _gb(their), times]))
    return "\n".join(lines)


def _is_beside(row: Row, others: Sequence[tuple[str, str]], ours: Row) -> bool:
    return (row["op"], row.get("impl")) in others and _order(row) == _order(ours) and "seconds" in row


def _parts(results: Results) -> list[str]:
    parts = []
    for title, ops in PARTS.items():
        lines = _header(["what", "by", "coordinates", "ms", "passes", "host ms", "waits", "launches"], texts=2)
        for row in (row for op in ops for row in results.latest(op)):
            cells = [row["op"], row["impl"], _millions(row), _ms(row), f"{row['passes']:.1f}"]
            lines.append(_line([*cells, _ms(row, "host_seconds"), _number(row, "waits"), _number(row, "launches")]))
        parts += [f"\n## {title}\n", *lines]
    return parts


def _correct(results: Results) -> str:
    checks = [[row for row in rows if row["op"] == "check"] for rows in results.runs]
    counts = [f"{sum(row['passed'] for row in rows)} of {len(rows)}" for rows in checks]
    told = [f"{count} in the {run}" for count, run, rows in zip(counts, _RUNS, checks, strict=True) if rows]
    return CORRECT.format(counts=", ".join(told))


def _training_facts(large: list[Row]) -> dict[str, Any]:
    dense = next(row for row in large if row["method"] == "dense")
    names = ("ranks", "steps", "tokens_per_step", "device", "when")
    return {"millions": f"{dense['parameters'] / 1e6:.0f}", **{name: dense[name] for name in names}}


def large_table(large: list[Row]) -> str:
    """Losses of the trainings at a real size, the best first; those that were cut short at the end."""
    lines = _header(["method", "ratio", "loss", "gap to dense, clipped %", "steps", "seconds of the GPU"], texts=1)
    dense = next(row["final_loss"] for row in large if row["method"] == "dense, clipped")
    for row in sorted(large, key=lambda row: (not row["finished"], row["final_loss"])):
        gap = f"{100 * (row['final_loss'] / dense - 1):+.1f}" if row["finished"] else "-"
        cells = [named(row), f"{row['ratio']:.1f}", f"{row['final_loss']:.4f}", gap, str(row["losses"][-1][0])]
        lines.append(_line([*cells, f"{row['seconds']:.0f}"]))
    return "\n".join(lines)


def named(row: Row) -> str:
    """A method with what was asked of it."""
    if row["method"].startswith("dense"):
        return str(row["method"])
    name, _, more = row["method"].partition(",")
    setting = f"rank {row['setting']:g}" if name == "powersgd" else f"{row['setting']:g}"
    return f"{name} {setting}" + (f",{more}" if more else "")


def _trained(training: list[Row]) -> str:
    head = ["method", "parameters", "ms a step", "until gradients are there", "exchange ms", "MB sent by a rank", "GB"]
    lines = _header(head, texts=1)
    for row in (row for row in training if "failed" not in row):
        exchange = 1e3 * row["phases"].get("exchange", 0.0)
        cells = [row["impl"], _millions(row), _ms(row), _ms(row, "compute_seconds"), f"{exchange:.1f}"]
        lines.append(_line([*cells, f"{row['bytes_per_step'] / 1e6:.1f}", _gb(row)]))
    return "\n".join(lines)


def _of(rows: Iterable[Row], op: str) -> list[Row]:
    return [row for row in rows if row["op"] == op and row.get("seconds") is not None]


def _order(row: Row) -> int:
    """The power of ten that its coordinates are about."""
    return round(math.log10(row["d"])) if row.get("d") else -1


def _header(names: Sequence[str], texts: int) -> list[str]:
    return [_line(names), _line(["---"] * texts + ["---:"] * (len(names) - texts))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(row: Row | None, name: str = "seconds") -> str:
    return "-" if row is None or row.get(name) is None else f"{1e3 * row[name]:.3g}"


def _gb(row: Row) -> str:
    return f"{(row.get('peak_bytes') or 0) / 1e9:.2f}"


def _millions(row: Row) -> str:
    return f"{row['d'] / 1e6:.0f} M"


def _number(row: Row, name: str) -> str:
    return "-" if row.get(name) is None else str(row[name])


def main(write: Callable[[str], object] = PAGE.write_text) -> None:
    """Write the page."""
    write(page(read()))


if __name__ == "__main__":
    main()
