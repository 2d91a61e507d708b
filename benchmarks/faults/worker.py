"""Training on which one rank fails: what every rank runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from benchmarks.faults.flips import METHODS
from hvd_sketch.comm import Communicator, default_communicator

STEPS, STEP, VICTIM = 6, 3, 1
SHORT = 0.4  # of the limit
THROUGH_DDP = "torchrun, DDP"


def _raise(limit: float) -> NoReturn:
    raise ValueError("this rank cannot go on")


def _interrupt(limit: float) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def _exit(limit: float) -> NoReturn:
    sys.exit(0)


def _kill(limit: float) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(limit: float) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _pause(limit: float) -> None:
    waking = f"import os, signal, time; time.sleep({SHORT * limit}); os.kill({os.getpid()}, signal.SIGCONT)"
    subprocess.Popen([sys.executable, "-S", "-c", waking])
    _stop(limit)


FAULTS: dict[str, tuple[Callable[[float], object], str]] = {
    "an exception": (_raise, "before"),
    "Ctrl-C": (_interrupt, "before"),
    "sys.exit(0)": (_exit, "before"),
    "one step() fewer": (_exit, "before"),
    "SIGKILL before the step": (_kill, "before"),
    "SIGKILL inside the first round": (_kill, "inside"),
    "SIGKILL between the rounds": (_kill, "between"),
    "SIGKILL while the update is written": (_kill, "writing"),
    "SIGSTOP, longer than the limit": (_stop, "between"),
    "SIGSTOP, shorter than the limit": (_pause, "between"),
}
"""What happens to the victim, and where in a step."""

ALONE = ("an exception", "sys.exit(0)", "one step() fewer")
"""Those that a thread can suffer while others go on."""

BEFORE = [name for name, (fault, point) in FAULTS.items() if point == "before" or fault in (_stop, _pause)]
"""Those of a method of its own, which need no place inside a step."""


def train(
    way: str, comm: Communicator | None, rank: int, fault: Callable[[], object] | None, point: str, *, fewer: bool
) -> list[float]:
    """A few steps; on the victim the fault at a point of one of them. The parameters at the end."""
    model, optimizer, exchange_of = prepared(way, comm)
    for step in range(STEP if fewer else STEPS):
        optimizer.zero_grad()
        inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(100 * step + rank))
        loss = (model(inputs) - inputs).square().mean()
        if step == STEP and fault is not None:
            strike(exchange_of(), fault, point)
        loss.backward()
        optimizer.step()
    with optimizer.average_model() if way in METHODS and not fewer else nullcontext():
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()


def prepared(way: str, comm: Communicator | None) -> tuple[nn.Module, Any, Callable[[], Any]]:
    """The model, the optimizer to step, and what gives the exchange: a method's, the hook's, or the optimizer's."""
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40))
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    compression = hvd.Compression.sharded(ratio=4, warmup_steps=0)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    if way in METHODS:
        method = METHODS[way](sgd, model, default_communicator())
        return model, method, lambda: None
    if way == THROUGH_DDP:
        parallel = nn.parallel.DistributedDataParallel(model)
        state = hvd.ddp.register(parallel, sgd, compression)
        return parallel, sgd, lambda: state.exchange
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression, comm=comm)
    return model, optimizer, lambda: optimizer.exchange


def strike(exchange: Any, fault: Callable[[], object], point: str) -> None:
    """Let the fault happen now, or when the coming step gets to the point; a method has no exchange: now."""
    if point == "before" or exchange is None:
        fault()
        return
    place, name = {
        "inside": (exchange.comm, "post_allreduce"),
        "between": (exchange.comm, "post_alltoall"),
        "writing": (exchange, "write_update"),
    }[point]
    proper = getattr(place, name)

    def struck(*arguments: Any) -> Any:
        if point == "inside":
            pending = proper(*arguments)
            fault()
            return pending
        setattr(place, name, proper)
        fault()
        return proper(*arguments)

    setattr(place, name, struck)


def tell(folder: Path, rank: int, **what: Any) -> None:
    """Leave what this rank has to say, with the time."""
    (folder / f"{rank}.json").write_text(json.dumps({"time": time.time(), **what}))


def main(backend: str, name: str, limit: float, folder: Path) -> None:
    """One rank of a run of its own processes."""
    if backend == "mpi4py" or backend in METHODS:
        sys.modules["horovod"] = None  # type: ignore[assignment]
    hvd.init()
    rank, (fault, point) = hvd.rank(), FAULTS[name]
    torch.set_num_threads(1)

    def struck() -> None:
        tell(folder, rank, struck=True)
        fault(limit)

    victim = rank == VICTIM and name != "nothing"
    fewer = victim and name == "one step() fewer"
    try:
        end = train(backend, None, rank, struck if victim and not fewer else None, point, fewer=fewer)
    except BaseException as error:
        if not victim:
            tell(folder, rank, error=f"{type(error).__name__}: {' '.join([str(error), *error_notes(error)])}")
        raise
    if fewer:
        tell(folder, rank, struck=True)
    else:
        tell(folder, rank, end=end)


def error_notes(error: BaseException) -> list[str]:
    """What was added to an error."""
    return getattr(error, "__notes__", [])


def in_process(name: str, limit: float, ranks: int) -> list[dict[str, Any]]:
    """The same with a thread for each rank: what every rank has to say."""
    from hvd_sketch.comm.in_process import InProcessGroup

    said: list[dict[str, Any]] = [{} for _ in range(ranks)]
    fault, point = FAULTS[name]

    def body(comm: Communicator) -> Tensor | None:
        victim = comm.rank == VICTIM
        fewer = victim and name == "one step() fewer"

        def struck() -> None:
            said[comm.rank] = {"time": time.time(), "struck": True}
            fault(limit)

        try:
            train("", comm, comm.rank, struck if victim and not fewer else None, point, fewer=fewer)
            said[comm.rank] = {"time": time.time(), "struck": fewer}
        except BaseException as error:
            if not victim:
                said[comm.rank] = {"time": time.time(), "error": f"{type(error).__name__}: {error}"}
            raise
        return None

    try:
        InProcessGroup(ranks, limit).run(body)
    except BaseException as error:
        said[VICTIM].setdefault("error", str(error))
    return said


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
