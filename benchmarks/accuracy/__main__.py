"""``python -m benchmarks.accuracy``: dense and every method on three tasks; resumable row by row."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.against import settle_dense
from benchmarks.accuracy.large.command import main as large
from benchmarks.accuracy.methods import BY_RATIO, LOW_RANK, LOW_RANKS, make, suits, way_of
from benchmarks.accuracy.report import write_page
from benchmarks.accuracy.simulate import train
from benchmarks.accuracy.tasks import TASKS, parameters
from hvd_sketch import ConfigurationError

RESULTS = Path("benchmarks/results/accuracy.json")
NAMES = ["dense", *BY_RATIO, *LOW_RANK]
Key = tuple[str, str, float, int, int, int, float]
"""Task, method, setting, ranks, seed, steps, scale of the learning rate."""


def main() -> None:
    """Train what is still missing, append each row as it is done, then write the page and the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, ratio 40, half of the steps")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--ranks", type=int, default=8, help="simulated ranks (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings (default: 0 1 2)")
    parser.add_argument("--ratios", type=float, nargs="+", help="(default: 10 40 100 400)")
    parser.add_argument("--steps", type=int, help="of every training (default: the task's)")
    parser.add_argument("--lr-scale", type=float, default=1.0, help="times dense's learning rate (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--page-only", action="store_true", help="only write the page from the rows that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page_only:
        _run_missing(options)
    write_page(_read(), Path("docs/benchmarks"))


def _run_missing(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    for key in tqdm(list(_runs(options)), unit="run"):
        rows = _read()
        if key not in map(_key, rows) and time.monotonic() < deadline:
            _append(_row(key, rows))


def _read() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def _append(row: dict[str, Any]) -> None:
    """Add a row; several of these programs may run at a time."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [*_read(), row]
        settle_dense(rows)
        fresh = RESULTS.with_suffix(".new")
        fresh.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        fresh.replace(RESULTS)


def _runs(options: argparse.Namespace) -> Iterator[Key]:
    """What to train, dense first, what matters most before the rest."""
    first, rest = _ratios(options)
    settings = [("dense", 1.0), *((method, ratio) for ratio in first for method in BY_RATIO)]
    settings += itertools.product(LOW_RANK, LOW_RANKS[-1:] if options.quick else LOW_RANKS)
    others = [(method, ratio) for ratio in rest for method in BY_RATIO]
    seeds = options.seeds[:1] if options.quick else options.seeds
    for chosen, seed, task in itertools.product((settings, others), seeds, options.tasks):
        steps = options.steps or TASKS[task].steps // (2 if options.quick else 1)
        for method, setting in (each for each in chosen if each[0] in options.methods and suits(each[0], task)):
            yield task, method, setting, options.ranks, seed, steps, options.lr_scale


def _ratios(options: argparse.Namespace) -> tuple[Sequence[float], Sequence[float]]:
    """Those to begin with, and the others."""
    if options.ratios:
        return options.ratios, ()
    return ((40.0,), ()) if options.quick else ((40.0, 100.0), (10.0, 400.0))


def _row(key: Key, rows: list[dict[str, Any]]) -> dict[str, Any]:
    task, method, setting, ranks, seed, steps, lr_scale = key
    row = {"task": task, "method": method, "setting": setting, "ranks": ranks, "seed": seed, "steps": steps}
    row |= {"lr_scale": lr_scale, "way": way_of(method)}
    try:
        outcome = train(TASKS[task], make(method, setting), ranks=ranks, seed=seed, steps=steps, lr_scale=lr_scale)
    except ConfigurationError as error:
        return {**row, "refused": str(error)}
    dense = [each for each in rows if _key(each) == (task, "dense", 1.0, ranks, seed, steps, 1.0)]
    sent = outcome.losses[-1][1]
    return {
        **row,
        "ratio": round((dense[0]["bytes_per_rank"] if dense else sent) / sent, 2),
        "final_loss": outcome.final_loss,
        "bytes_per_rank": sent,
        "bytes_per_parameter": round(sent / parameters(TASKS[task]), 2),
        "diverged": outcome.diverged,
        "losses": outcome.losses,
    }


def _key(row: dict[str, Any]) -> Key:
    names = ("task", "method", "setting", "ranks", "seed", "steps", "lr_scale")
    task, method, setting, ranks, seed, steps, lr_scale = (row[name] for name in names)
    return task, method, setting, ranks, seed, steps, lr_scale


if __name__ == "__main__":
    if "--large" in sys.argv:
        large([argument for argument in sys.argv[1:] if argument != "--large"])
    else:
        main()
