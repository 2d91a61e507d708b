"""``python -m benchmarks.gpu``: see `benchmarks.gpu`."""

from __future__ import annotations

import argparse
import faulthandler
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.facts import tell_facts, time_rates
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.record import Record
from benchmarks.gpu.steps import STEPS, time_optimizers

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu.json"


COMMAND = (sys.executable, "-m", "benchmarks.gpu")
"""Starts this program."""
GROUPS = ("facts", "checks", "steps", "parts", "optimizers", "peers")


class Item(NamedTuple):
    """One thing to do on vectors of about d coordinates, and the most seconds that it may take."""

    group: str
    do: Callable[[Bench, int], None]
    d: int
    limit: float = 45.0

    @property
    def name(self) -> str:
        return self.do.__name__


SIZES = (100_000_000, 1_000_000_000, 10_000_000)


def items(small: bool, groups: Collection[str], sizes: Sequence[int] = SIZES) -> list[Item]:
    """What to do, the most important first."""
    main, *others = (150_000,) if small else sizes
    everything = [
        Item("facts", tell_facts, main),
        *(Item("facts", time_rates, d) for d in (main, *others)),
        *(Item("checks", check, main, limit=180.0) for check in CHECKS),
        *(Item("steps", step, main) for step in STEPS),
        *(Item("parts", part, main) for part in PARTS),
        Item("optimizers", time_optimizers, main),
        *(Item("steps", step, d) for d in others for step in STEPS),
        *(Item("peers", peer, main) for peer in PEERS),
        *(Item("parts", part, d) for d in others for part in PARTS),
        *(Item("optimizers", time_optimizers, d) for d in others),
        *(Item("peers", peer, d) for d in others for peer in PEERS),
    ]
    return [item for item in everything if item.group in groups]


def main(arguments: Sequence[str]) -> int:
    """Measure in a process, and go on in another when it ends: a device that went wrong serves the first no more."""
    options = _parse(arguments)
    record = Record(options.out)
    if options.begin is not None:
        return _work(options, record)
    record.start()
    until, begin, todo = time.time() + 60 * options.minutes, 0, items(options.small, options.only, options.sizes)
    while begin < len(todo) and time.time() < until:
        command = [*COMMAND, *arguments, "--begin", str(begin), "--until", str(until)]
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            break
        at, deadline = _progress(options.out).read_text().split()
        item, late = todo[int(at)], time.time() >= float(deadline)
        why = {"missing": "its time was over"} if late else {"failed": f"its process ended with status {status}"}
        record.append({"op": item.name, "d": item.d, **why})
        begin = int(at) + 1
    _progress(options.out).unlink(missing_ok=True)
    failures, missing = (sum(word in row for row in record.rows()) for word in ("failed", "missing"))
    print(f"{len(record.rows())} rows, of which {failures} failed and {missing} are missing", flush=True)
    return int(failures > 0)


def _work(options: argparse.Namespace, record: Record) -> int:
    """Do all items from a number on, until the time is over."""
    bench = Bench(torch.device(options.device), record, seconds=0.001 if options.small else 0.25)
    for number, item in enumerate(items(options.small, options.only, options.sizes)[options.begin :], options.begin):
        left = options.until - time.time()
        if left <= 0.0:
            return 0
        limit = min(item.limit, left + 10.0)
        _progress(options.out).write_text(f"{number} {time.time() + limit}")
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            item.do(bench, item.d)
        except Exception as error:
            bench.fail(item.name, "", item.d, error)
        faulthandler.cancel_dump_traceback_later()
        bench.free()
    return 0


def _progress(out: Path) -> Path:
    """Where a process tells which item it is at, and when that one's time will be over."""
    return out.with_suffix(".at")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__))
    parser.add_argument("--minutes", type=float, default=5.0, help="start nothing after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a processor, to try the measurements")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="coordinates, the main size first")
    parser.add_argument("--begin", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
