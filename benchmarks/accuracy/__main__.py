"""``python -m benchmarks.accuracy``: dense and every method on three tasks; resumable row by row."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.large.command import main as large
from benchmarks.accuracy.methods import LOW_RANK, LOW_RANKS, METHODS, make, suits
from benchmarks.accuracy.report import write_page
from benchmarks.accuracy.simulate import train
from benchmarks.accuracy.tasks import TASKS
from hvd_sketch import ConfigurationError

RESULTS = Path("benchmarks/results/accuracy.json")
NAMES = ["dense", *METHODS, *LOW_RANK]
Key = tuple[str, str, float, int, int, int]


def main() -> None:
    """Train what is still missing, append each row as it is done, then write the page and the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, ratio 40, half of the steps")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--ranks", type=int, default=8, help="simulated ranks (default: 8)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: 3)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--page-only", action="store_true", help="only write the page from the rows that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page_only:
        _run_missing(options)
    write_page(_read(), Path("docs/benchmarks"))


def _run_missing(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    for task, method, setting, seed, steps in tqdm(list(_runs(options)), unit="run"):
        rows, key = _read(), (task, method, setting, options.ranks, seed, steps)
        if key not in map(_key, rows) and time.monotonic() < deadline:
            _append(_row(task, method, setting, options.ranks, seed, steps, rows))


def _read() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def _append(row: dict[str, Any]) -> None:
    """Add a row; several of these programs may run at a time."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [*_read(), row]
        fresh = RESULTS.with_suffix(".new")
        fresh.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        fresh.replace(RESULTS)


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, str, float, int, int]]:
    """(task, method, ratio or PowerSGD rank, seed, steps), dense first, what matters most before the rest."""
    ratios = (40.0,) if options.quick else (40.0, 100.0)
    settings = [("dense", 1.0), *((method, ratio) for ratio in ratios for method in METHODS)]
    settings += itertools.product(LOW_RANK, LOW_RANKS[-1:] if options.quick else LOW_RANKS)
    rest = [] if options.quick else [(method, ratio) for ratio in (10.0, 400.0) for method in METHODS]
    seeds = range(1 if options.quick else options.seeds)
    for chosen, seed, task in itertools.product((settings, rest), seeds, options.tasks):
        for method, setting in (each for each in chosen if each[0] in options.methods and suits(each[0], task)):
            yield task, method, setting, seed, TASKS[task].steps // (2 if options.quick else 1)


def _row(
    task: str, method: str, setting: float, ranks: int, seed: int, steps: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    dense = [row for row in rows if _key(row) == (task, "dense", 1.0, ranks, seed, steps)]
    row = {"task": task, "method": method, "setting": setting, "ranks": ranks, "seed": seed, "steps": steps}
    try:
        outcome = train(TASKS[task], make(method, setting), ranks=ranks, seed=seed, steps=steps)
    except ConfigurationError as error:
        return {**row, "refused": str(error)}
    dense_bytes = dense[0]["bytes_per_rank"] if dense else outcome.losses[-1][1]
    return {
        **row,
        "ratio": round(dense_bytes / outcome.losses[-1][1], 2),
        "final_loss": outcome.final_loss,
        "dense_loss": dense[0]["final_loss"] if dense else outcome.final_loss,
        "bytes_per_rank": outcome.losses[-1][1],
        "diverged": outcome.diverged,
        "losses": outcome.losses,
    }


def _key(row: dict[str, Any]) -> Key:
    return row["task"], row["method"], row["setting"], row["ranks"], row["seed"], row["steps"]


if __name__ == "__main__":
    if "--large" in sys.argv:
        large([argument for argument in sys.argv[1:] if argument != "--large"])
    else:
        main()
