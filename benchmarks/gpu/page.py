"""``python -m benchmarks.gpu.page``: ``docs/benchmarks/gpu.md``, from the rows alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "gpu.md"
GOALS = {
    "sketch": 6.5,
    "sharded": 6.0,
    "topk": 6.0,
    "powersgd": 9.0,
    "stride": 5.0,
    "dense": 3.0,
}
"""Passes over the vector that a whole step of an exchange aims at."""

_HEAD = """\
# On a GPU, measured

Written by `python -m benchmarks.gpu.page` from `benchmarks/results/gpu.json` (now), `gpu-first.json` (the first run on
a GPU, before its findings were worked in) and `gpu-training.json`. Everything here ran on **{devices}**; of other GPUs
nothing is known. {facts}

Times are medians, in milliseconds: until the device was done, with its second-level cache overwritten before each
call, and until the host was (*host*). A **pass** is 4 bytes for each coordinate, read or written: half of what a copy
of that size takes. *Waits*: how often the host waited for the device in a call; *launches*: kernels, copies and fills.
The exchanges are those of one rank of {ranks} that all send the same, the network left out, at ratio {ratio:g}.

## Correct there

The tests that need a device (`tests/exchange/test_device.py`, and those of the kernels) ran there first: {checks}.
Every exchange but PowerSGD's has the bits of the processor's kernel: gradients of float32, float16 and bfloat16,
zeros, ties, subnormal numbers, momentum correction, simulated ranks; codes have the same bytes; what is chosen is the
same beyond 2^31 coordinates; a step that is not finite changes nothing; a table of NaN is not left; a second run has
the same bits. compute-sanitizer found nothing in the kernels of choosing and coding.

"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(*(_read(name) for name in ("gpu.json", "gpu-first.json", "gpu-training.json"))))


def _read(name: str) -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / name).read_text()) if (RESULTS / name).exists() else []
    return rows


def page(rows: list[Row], first: list[Row], training: list[Row]) -> str:
    """The whole text."""
    steps = [row for row in rows if row["op"] == "step"]
    passed = [row for row in rows if row["op"] == "check"]
    facts = next((row["note"] for row in rows if row["op"] == "facts"), "")
    head = _HEAD.format(
        devices=", ".join(sorted({row["device"] for row in rows if row.get("device")})),
        facts=f"Software: {facts}.",
        ranks=steps[0]["ranks"] if steps else 0,
        ratio=steps[0]["ratio"] if steps else 0,
        checks=f"{sum(row.get('passed', False) for row in passed)} of {len(passed)} passed",
    )
    parts = [head, "## Whole steps\n", _steps(steps, first), _shortfall(steps)]
    for title, ops in _TABLES.items():
        parts += [f"\n## {title}\n", _table(row for row in rows if row["op"] in ops)]
    parts += [_TRAINING, _trained(training)]
    return "\n".join(parts) + "\n"


_TABLES = {
    "Parts": ("stage", "heaviest", "encode", "decode", "add", "advance", "top_k", "common_share", "moments"),
    "Adam, alone and with anticipation around it": ("optimizer", "ahead"),
    "What others do": ("topk", "backward"),
    "The device": ("copy", "norm", "launch", "wait"),
}
_TRAINING = """
## A training of two ranks on one GPU

A transformer, float32 parameters with products in bfloat16, AdamW, 4096 tokens a rank and step
(`mpirun -np 2 python -m benchmarks.gpu.training`). Two processes share the GPU; messages go through pinned host memory
and MPI over shared memory, so *dense* is bound by summing on the processor. *alone* exchanges nothing.
"""


def _steps(steps: list[Row], first: list[Row]) -> str:
    lines = [
        "| exchange | coordinates | ms | first run | passes | goal | host ms | waits | launches | GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    before = {(row["impl"], row["d"]): row for row in first if row["op"] == "step"}
    for row in sorted(steps, key=lambda row: (list(GOALS).index(_kind(row)), row["impl"], row["d"])):
        old = before.get((row["impl"], row["d"]), {}).get("seconds")
        lines.append(
            f"| {row['impl']} | {row['d'] / 1e6:.0f} M | {1e3 * row['seconds']:.2f} | "
            f"{f'{1e3 * old:.2f}' if old else '-'} | {row['passes']:.1f} | {GOALS[_kind(row)]:g} | "
            f"{1e3 * row['host_seconds']:.2f} | {_number(row.get('waits'))} | {_number(row.get('launches'))} | "
            f"{(row.get('peak_bytes') or 0) / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _kind(row: Row) -> str:
    return str(row["impl"]).split(",")[0]


def _shortfall(steps: list[Row]) -> str:
    met = sum(row["passes"] <= GOALS[_kind(row)] for row in steps)
    return f"\nOf {len(steps)} rows {met} meet their goal."


def _table(rows: Iterable[Row]) -> str:
    lines = [
        "| what | by | coordinates | ms | passes | host ms | waits | launches |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['op']} | {row['impl']} | {row['d'] / 1e6:.0f} M | {1e3 * row['seconds']:.3f} | {row['passes']:.1f} | "
        f"{1e3 * row['host_seconds']:.3f} | {_number(row.get('waits'))} | {_number(row.get('launches'))} |"
        for row in rows
        if row.get("seconds") is not None
    ]
    return "\n".join(lines)


def _trained(training: list[Row]) -> str:
    lines = [
        "| method | parameters | ms a step | until gradients are there | MB sent by a rank | GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['impl']} | {row['d'] / 1e6:.0f} M | {1e3 * row['seconds']:.1f} | "
        f"{1e3 * row['compute_seconds']:.1f} | {row['bytes_per_step'] / 1e6:.1f} | "
        f"{(row['peak_bytes'] or 0) / 1e9:.2f} |"
        for row in training
        if "failed" not in row
    ]
    return "\n".join(lines)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
