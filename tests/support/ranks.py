"""Run a function of a test file on real ranks: ``ranks(2, body, argument)``.

The ranks are processes started by mpirun, horovodrun or torchrun, as a user starts them, and born in a
`tests.support.nursery`. Each calls the function with the pickled arguments, and leaves its return value or its
traceback in a folder. A run that does not end in time is killed, and fails with the place where every rank stood.
"""

import faulthandler
import importlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import psutil
import pytest

from tests.support import nursery
from tests.support.leave import leave
from tests.support.rank import RANK_VARIABLES

Result = TypeVar("Result")
Launcher = Literal["mpirun", "horovodrun-gloo", "horovodrun-mpi", "torchrun"]

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHERS: Mapping[Launcher, Sequence[str]] = {
    "mpirun": ("mpirun", "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none", "--tag-output", "-np"),
    "horovodrun-gloo": ("horovodrun", "--gloo", "-np"),
    "horovodrun-mpi": ("horovodrun", "--mpi", "-np"),
    "torchrun": ("python", "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"),
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "5",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "20",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl": "self,vader",  # ranks share a host; ready for TCP, the end of each would take a second
    "OMPI_MCA_mpi_yield_when_idle": "1",  # tests run side by side: a rank that waits leaves its core to others
    "PYTHONUNBUFFERED": "",  # unbuffered, the words of two ranks mix within a line
}
quick = False
"""Whether tests that start processes are to be left out; see ``--quick``."""
OTHERS_MAY_FAIL_TOO = 1.0  # seconds a failed rank waits before its exit makes the launcher kill the rest


class Completed(NamedTuple):
    """How a launched command ended: the launcher's exit status, and what all ranks printed."""

    returncode: int
    output: str


class RanksFailed(AssertionError):
    """A rank raised, died, or did not end in time; the text shows every rank's traceback and the output."""


class RanksTimedOut(RanksFailed):
    """The ranks did not end in time and were killed."""


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 200, cwd: Path = ROOT
) -> Completed:
    """Run a command with the ranks' environment and first on the PATH `python` and this Python's folder.

    Raises:
        RanksTimedOut: it did not end within `timeout` seconds; it and all its descendants were killed.
    """
    path = os.pathsep.join((_nursery(), str(Path(sys.executable).parent), os.environ["PATH"]))
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **ENVIRONMENT, "PATH": path, "PYTHONPATH": python_path, **(env or {})}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            end(process)
            output.seek(0)
            raise RanksTimedOut(f"killed after {timeout:g} s: {' '.join(command)}\n{output.read()}") from None
        finally:
            end(process)
        output.seek(0)
        return Completed(returncode, output.read())


def launch(
    count: int,
    command: Sequence[str],
    *,
    launcher: Launcher = "mpirun",
    env: Mapping[str, str] | None = None,
    timeout: float = 200,
) -> Completed:
    """Run a command line on `count` ranks; see `run`."""
    return run((*LAUNCHERS[launcher], str(count), *command), env=env, timeout=timeout)


def python(*arguments: object) -> list[str]:
    """The command of Python with these arguments, for one that has imported PyTorch already.

    It is as another in all but what was imported; what a test tells of imports or of Python's start needs a new one.
    """
    return [f"{_nursery()}/python", *map(str, arguments)]


def _nursery() -> str:
    """Its folder; a test that asks for it is left out where none may start processes."""
    if quick:
        pytest.skip("starts processes")
    return nursery.folder()


def ranks(
    count: int,
    body: Callable[..., Result],
    *args: object,
    launcher: Launcher = "mpirun",
    env: Mapping[str, str] | None = None,
    timeout: float = 200,
) -> list[Result]:
    """Call ``body(*args)`` on `count` ranks and return what each of them returned, by rank.

    Args:
        body: a top-level function of an importable module; its arguments and results must pickle (tensors do).
        launcher: how the ranks are started; nothing is initialised for them (the body calls ``hvd.init()``).
        env: variables to set on top of `ENVIRONMENT`.
        timeout: seconds, process start and imports included.

    Raises:
        RanksFailed: with the traceback of every rank that raised, and all output.
        RanksTimedOut: with the stack of every rank that hung; all processes were killed.
    """
    if "<locals>" in body.__qualname__ or body.__module__ == "__main__":
        raise ValueError(f"{body.__qualname__}: ranks can only import a top-level function of a test module")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        deadline = time.time() + max(timeout - 5, timeout / 2)
        (folder / "call").write_bytes(pickle.dumps((body.__module__, body.__qualname__, deadline, args)))
        command = (sys.executable, str(nursery.ASK), _nursery(), name)
        try:
            completed = launch(count, command, launcher=launcher, env=env, timeout=timeout)
        except RanksTimedOut as error:
            raise RanksTimedOut(f"{told(folder, count, 'stack')}\n{error}") from None
        results = [folder / f"result.{rank}" for rank in range(count)]
        if completed.returncode or not all(result.exists() for result in results):
            status = f"the launcher's exit status is {completed.returncode}; output of all ranks:"
            raise RanksFailed(f"{told(folder, count, 'traceback')}\n{status}\n{completed.output}")
        return [pickle.loads(result.read_bytes()) for result in results]


def several(body: Callable[..., Result], each: Sequence[tuple[Any, ...]]) -> list[Result]:
    """For `ranks`: what a body returns for each of these arguments, in one launch, for to start costs the most."""
    return [body(*args) for args in each]


def in_turn(bodies: Sequence[Callable[[], Any]]) -> list[Any]:
    """For `ranks`: what each of these bodies returns, in one launch."""
    return [body() for body in bodies]


def told(folder: Path, count: int, kind: str) -> str:
    """What each rank left in its file of this kind."""
    told = [(rank, folder / f"{kind}.{rank}") for rank in range(count)]
    texts = [(rank, file.read_text().strip() if file.exists() else "") for rank, file in told]
    return "\n".join(f"rank {rank} of {count}: {text or f'left no {kind}'}" for rank, text in texts)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its descendants: politely first, because a launcher then clears up after itself."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=5)
    for survivor in alive:
        survivor.kill()
    process.wait()


def rank_main(folder: Path) -> None:
    """What each rank runs: load the call, make it, leave the result."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the words of a rank that is killed are not lost
    rank = next(os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    module, name, deadline, args = pickle.loads((folder / "call").read_bytes())
    with (folder / f"stack.{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(max(0.1, deadline - time.time()), file=stack)
        try:
            result = pickle.dumps(getattr(importlib.import_module(module), name)(*args))
        except BaseException:
            (folder / f"traceback.{rank}").write_text(traceback.format_exc())
            time.sleep(OTHERS_MAY_FAIL_TOO)
            os._exit(1)  # an orderly exit would wait in Horovod's shutdown for ranks that hang
        faulthandler.cancel_dump_traceback_later()
    (folder / f"result.{rank}").write_bytes(result)
    distributed = sys.modules.get("torch.distributed")  # not imported for a body that does without PyTorch
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()  # as PyTorch wants it of a script
    leave(0)
