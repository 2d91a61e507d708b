"""``python -m benchmarks.gpu``: see `benchmarks.gpu`."""

from __future__ import annotations

import argparse
import faulthandler
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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


class Item(NamedTuple):
    """One thing to do on vectors of about d coordinates, and the most seconds that it may take."""

    do: Callable[[Bench, int], None]
    d: int
    limit: float = 45.0

    @property
    def name(self) -> str:
        return self.do.__name__


def items(small: bool) -> list[Item]:
    """What to do, the most important first."""
    main, *others = (1_000_000,) if small else (100_000_000, 1_000_000_000, 10_000_000)
    return [
        Item(tell_facts, main),
        *(Item(time_rates, d) for d in (main, *others)),
        *(Item(check, main, limit=90.0) for check in CHECKS),
        *(Item(step, main) for step in STEPS),
        *(Item(part, main) for part in PARTS),
        Item(time_optimizers, main),
        *(Item(step, d) for d in others for step in STEPS),
        *(Item(peer, main) for peer in PEERS),
        *(Item(part, d) for d in others for part in PARTS),
        *(Item(time_optimizers, d) for d in others),
        *(Item(peer, d) for d in others for peer in PEERS),
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure in a process, and go on in another when it ends: a device that went wrong serves the first no more."""
    options = _parse(arguments)
    record = Record(options.out)
    if options.begin is not None:
        return _work(options, record)
    record.start()
    until, begin, todo = time.time() + 60 * options.minutes, 0, items(options.small)
    while begin < len(todo) and time.time() < until:
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--begin", str(begin), "--until", str(until)]
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            break
        at = int(_progress(options.out).read_text())
        record.append({"op": todo[at].name, "d": todo[at].d, "failed": f"its process ended with status {status}"})
        begin = at + 1
    _progress(options.out).unlink(missing_ok=True)
    failures = sum("failed" in row for row in record.rows())
    print(f"{len(record.rows())} rows, of which {failures} failed", flush=True)
    return int(failures > 0)


def _work(options: argparse.Namespace, record: Record) -> int:
    """Do all items from a number on, until the time is over."""
    bench = Bench(torch.device(options.device), record, seconds=0.02 if options.small else 0.25)
    for number, item in enumerate(items(options.small)[options.begin :], options.begin):
        left = options.until - time.time()
        if left <= 0.0:
            return 0
        _progress(options.out).write_text(str(number))
        faulthandler.dump_traceback_later(min(item.limit, left + 10.0), exit=True)
        try:
            item.do(bench, item.d)
        except Exception as error:
            bench.fail(item.name, "", item.d, error)
        faulthandler.cancel_dump_traceback_later()
        bench.free()
    return 0


def _progress(out: Path) -> Path:
    """Where a process tells which item it is at."""
    return out.with_suffix(".at")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__))
    parser.add_argument("--minutes", type=float, default=5.0, help="start nothing after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a processor, to try the measurements")
    parser.add_argument("--begin", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
