"""Workers that die, stop and come back, or are started again, and a server that dies: real processes, by order."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_sketch.methods.server import Place, ServerLost, place, read_log
from hvd_sketch.methods.server.log import Happened
from tests.methods.server.asynchronous import async_sgd
from tests.methods.server.support import Vector
from tests.support.ranks import launch, python

KILLED, STOPPED, FAILED = 2, 3, 4
UNHURT = (0, 1, 3)  # worker 3 came back
STEPS, HURT_AT = 90, 3
PATIENCE = 1.5
ORPHANS_LIVE = {"OMPI_MCA_orte_enable_recovery": "1"}  # what mpirun's --enable-recovery sets


def train(here: Any, folder: Path, name: str, hurt: bool, **arguments: Any) -> None:
    """Some slow steps, of which workers that are to be hurt take a few; what each rank and the server saw."""
    model, told, rank = Vector(torch.zeros(10)), "done", here.rank
    optimizer = async_sgd(model, here, log=folder / f"{name} log", patience=PATIENCE, **arguments)
    try:
        with optimizer:
            for step in optimizer.work(range(STEPS)):
                if hurt and step == HURT_AT:
                    hurt_one(rank)
                time.sleep(0.05)
                model.x.grad = torch.ones(10)
                optimizer.step()
    except (ServerLost, ZeroDivisionError) as error:
        told = f"{type(error).__name__}: {error}"
    lost = {rank: counted.lost for rank, counted in optimizer.stats.workers.items()}
    as_who = "replacement" if getattr(here, "way", None) is not None else "rank"
    (folder / f"{name} {as_who} {rank}").write_text(json.dumps([told, optimizer.stats.pushes, lost]))


def hurt_one(rank: int) -> None:
    if rank == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == STOPPED:
        wake = f"sleep {2.5 * PATIENCE}; kill -CONT {os.getpid()}"
        os.spawnl(os.P_NOWAIT, "/bin/sh", "sh", "-c", wake)
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == FAILED:
        raise ZeroDivisionError("its own")


def end_server(here: Any, folder: Path) -> None:
    """The server kills itself after its tenth change."""

    def end(version: int) -> None:
        if version == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    train(here, folder, "server", False, on_change=end)


def on_5_ranks(name: str) -> None:
    from mpi4py import MPI

    warnings.simplefilter("ignore", RuntimeWarning)
    world, folder, here = MPI.COMM_WORLD, Path(name), place()
    if here.way is not None:
        train(here, folder, "again", False)
        return
    unhurt, two = world.Split(world.rank in UNHURT), world.Split(world.rank in UNHURT[:2])
    train(world, folder, "first", True)
    if world.rank in UNHURT:
        train(unhurt, folder, "again", True, restarts=1)
    if world.rank in UNHURT[:2]:
        end_server(two, folder)
    os._exit(0)  # Open MPI would wait at the end of this process, and for ever when another dies meanwhile


Told = dict[str, list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    program = f"from tests.methods.server.test_faults import on_5_ranks; on_5_ranks({str(folder)!r})"
    over_tcp = {"OMPI_MCA_btl": "self,vader,tcp"}  # as a worker that is started again is reached
    launch(5, python("-c", program), env=ORPHANS_LIVE | over_tcp, timeout=200)
    return folder


def told_in(folder: Path, run: str) -> Told:
    files = sorted(file for file in folder.iterdir() if file.name.startswith(run) and not file.name.endswith("log"))
    return {file.name.removeprefix(f"{run} "): json.loads(file.read_text()) for file in files}


def others_meanwhile(folder: Path, run: str, worker: int) -> int:
    """Pushes of others between a worker's last one and the moment when the server counted it as lost."""
    events = list(read_log(folder / f"{run} log"))
    (lost,) = (i for i, event in enumerate(events) if (event.what, event.worker) == (Happened.LOST, worker))
    last = max(i for i, event in enumerate(events[:lost]) if event.worker == worker)
    return sum(event.what == Happened.PUSH for event in events[last:lost])


def pushes_after_loss(folder: Path, run: str, worker: int) -> int:
    events = [event for event in read_log(folder / f"{run} log") if event.worker == worker]
    whats = [event.what for event in events]
    return whats[whats.index(Happened.LOST) :].count(Happened.PUSH)


def test_workers_that_die_stop_or_fail_hold_nobody_up(folder: Path) -> None:
    told = told_in(folder, "first")
    assert told["rank 1"][:2] == ["done", STEPS]
    assert told["rank 0"][0] == "done"
    assert told["rank 0"][1] == 2 * STEPS + 2 * HURT_AT
    assert told["rank 0"][2] == {"1": 0, "2": 1, "3": 1, "4": 1}
    assert f"rank {KILLED}" not in told
    assert others_meanwhile(folder, "first", KILLED) > 5
    assert pushes_after_loss(folder, "first", KILLED) == 0


def test_a_worker_that_stops_and_comes_back_goes_on_where_it_was(folder: Path) -> None:
    assert told_in(folder, "first")[f"rank {STOPPED}"][:2] == ["done", STEPS]
    assert others_meanwhile(folder, "first", STOPPED) > 5
    assert pushes_after_loss(folder, "first", STOPPED) == STEPS - HURT_AT


def test_a_worker_that_ends_by_an_error_is_left_out_at_once(folder: Path) -> None:
    assert told_in(folder, "first")[f"rank {FAILED}"][0] == "ZeroDivisionError: its own"
    assert pushes_after_loss(folder, "first", FAILED) == 0


def test_a_worker_that_dies_is_started_again_and_does_its_part(folder: Path) -> None:
    told = told_in(folder, "again")
    assert sorted(told) == ["rank 0", "rank 1", f"replacement {KILLED}"]
    assert told[f"replacement {KILLED}"] == ["done", STEPS, {}]
    assert told["rank 0"] == ["done", 2 * STEPS + HURT_AT, {"1": 0, "2": 1}]


def test_the_death_of_the_server_is_an_error_on_its_workers(folder: Path) -> None:
    told = told_in(folder, "server")
    assert sorted(told) == ["rank 1"]
    assert told["rank 1"][0].startswith(
        "ServerLost: rank 1: the server, rank 0, has not answered for 1.5 s (patience)"
    )


def test_a_place_is_taken_as_it_is() -> None:
    from mpi4py import MPI

    here = place(MPI.COMM_SELF)
    assert here == Place(0, 1, MPI.COMM_SELF)
    assert place(here) is here
