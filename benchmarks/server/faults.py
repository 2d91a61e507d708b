"""One of four workers dies, stops for half a minute, or is started again: what the others' pushes make of it.

``python -m benchmarks.server.faults --seeds 0 1``

A server and four workers over MPI, for a minute; a push is one step, which takes 50 ms, mostly asleep. After a
quarter of a minute one process is hurt, between a model that it was sent and its push.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

import hvd_sketch as hvd
from benchmarks.server import rows
from benchmarks.server.link import Vector, clock
from benchmarks.server.rows import Row
from hvd_sketch.methods.server import ServerLost, place, read_log
from hvd_sketch.methods.server.log import Event, Happened

RANKS, SERVER, VICTIM = 5, 0, 1
SECONDS, HURT_AFTER, STOPPED, STEP, PATIENCE = 60.0, 15.0, 30.0, 0.05, 5.0
BEFORE, SINCE = 10.0, STOPPED  # seconds around the fault that are looked at
LIMIT = 240.0  # seconds of a run with its start
FAULTS = ("none", "killed", "killed, started again", f"stopped for {STOPPED:g} s", "the server is killed")
MPIRUN = ("mpirun", "-np", f"{RANKS}", "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none", "--enable-recovery")


def on_rank(fault: str, seed: int, folder: str) -> None:
    """What every process does, the one in place of a dead one too."""
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1)
    here, model, due = place(), Vector(1000), 0.0
    pace, first = random.Random(f"{seed} {here.rank}"), here.way is None
    victim = first and here.rank == (SERVER if fault == "the server is killed" else VICTIM)

    def strike(version: int = 0) -> None:
        nonlocal victim, due
        due = due or time.monotonic() + HURT_AFTER
        if victim and time.monotonic() > due:
            victim = False
            note(folder, "hurt")
            hurt(fault)

    optimizer = hvd.AsyncSGD(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        model,
        here,
        patience=PATIENCE,
        restarts=int(fault == "killed, started again"),
        log=f"{folder}/log",
        on_change=strike,
    )
    try:
        with optimizer:
            for _ in optimizer.work(clock(SECONDS)):
                strike()
                time.sleep(pace.uniform(0.8, 1.2) * STEP)
                model.x.grad = torch.ones(1000)
                optimizer.step()
    except ServerLost:
        note(folder, f"told {here.rank}")
    os._exit(0)  # Open MPI would wait at the end of this process, and for ever when another dies meanwhile


def note(folder: str, name: str) -> None:
    """Write down when something happened, on the clock that all processes of a machine have in common."""
    Path(folder, name).write_text(repr(time.monotonic()))


def hurt(fault: str) -> None:
    """Do it to this process."""
    if fault.startswith("stopped"):
        os.spawnl(os.P_NOWAIT, "/bin/sh", "sh", "-c", f"sleep {STOPPED}; kill -CONT {os.getpid()}")
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault != "none":
        os.kill(os.getpid(), signal.SIGKILL)


def run(cell: Row) -> Row:
    """One minute."""
    with tempfile.TemporaryDirectory() as folder:
        program = (
            f"from benchmarks.server.faults import on_rank; on_rank({cell['fault']!r}, {cell['seed']}, {folder!r})"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parents[2]}"}
        command = [*MPIRUN, sys.executable, "-c", program]
        subprocess.run(command, env=environment, timeout=LIMIT, check=False, stdin=subprocess.DEVNULL)
        when = float(Path(folder, "hurt").read_text())
        told = [float(file.read_text()) - when for file in Path(folder).glob("told *")]
        if told:
            return {"told": len(told), "told_after": round(max(told), 2)}
        return seen(list(read_log(f"{folder}/log")), when)


def seen(events: Sequence[Event], when: float) -> Row:
    """What a server's log tells of a fault at this moment."""
    pushes = [event for event in events if event.what == Happened.PUSH]
    others = [event for event in pushes if event.worker != VICTIM]
    lost = [event.at - when for event in events if (event.what, event.worker) == (Happened.LOST, VICTIM)]
    back = [event.at - when for event in pushes if event.worker == VICTIM and event.at > when]
    row: Row = {}
    for name, start, stop in (("before", when - BEFORE, when), ("since", when, when + SINCE)):
        here = [event for event in others if start <= event.at < stop]
        row[name] = round(len(here) / (stop - start), 2)
        row[f"longest_{name}"] = round(longest(here, stop), 3)
    return {**row, **{name: round(moments[0], 2) for name, moments in (("lost", lost), ("back", back)) if moments}}


def longest(pushes: Sequence[Event], stop: float) -> float:
    """Seconds between two pushes of one worker, or from its last one until then."""
    moments: dict[int, list[float]] = {}
    for event in pushes:
        moments.setdefault(event.worker, []).append(event.at)
    return max(after - before for own in moments.values() for before, after in pairwise([*own, stop]))


def main() -> None:
    """Measure what is missing."""
    options = rows.parser(__doc__).parse_args()
    rows.fill("faults", rows.grid(seed=options.seeds, fault=FAULTS), run, options.results)


if __name__ == "__main__":
    main()
