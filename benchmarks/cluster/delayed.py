"""Links with delay: a switch that is a program of its own, in place of a bridge; see ``switch.cpp``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cluster.network import ClusterError, tool
from benchmarks.cluster.requirements import program

_SOURCE = Path(__file__).with_name("switch.cpp")


def start(folder: Path, namespace: str, ports: Sequence[str], mbit: float, delay: float, *, stay: bool) -> int:
    """Start the switch in its namespace; frames reach their host's link ``delay`` ms after they left the sender's.

    The program is compiled into ``folder``. It is one of the namespace's processes and ends with them; without
    ``stay`` also with this process, however that ends. Returns its process id.

    Raises:
        ClusterError: with what the compiler or the program said.
    """
    built, log = folder / "switch", folder / "switch.log"
    tool("g++", "-std=c++17", "-O2", "-o", str(built), str(_SOURCE))
    parent = 0 if stay else os.getpid()
    with log.open("w") as said:
        process = subprocess.Popen(
            [program("ip"), "netns", "exec", namespace, built, *map(str, (parent, mbit, delay)), *ports],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout as told:
        if not told.readline():
            raise ClusterError(f"the switch does not start:\n{log.read_text().strip()}")
    return process.pid
