"""Network namespaces and the links between them, through ``ip`` and ``tc``.

Every interface is made inside a namespace, so nothing of it is seen in the machine's own network, and all of it is
gone with the namespaces.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cluster.requirements import program

_BRIDGE = "switch"
_BURST = 1e-3  # seconds of sending that an idle link saves up, and may then do at once
_LEAST_BURST = 6000  # bytes: four full packets
_MOST_AT_ONCE = 65536  # bytes of several packets that TCP may hand down as one, the kernel's own limit
_QUEUE = "100ms"  # of sending time; what does not fit is dropped, and TCP slows down
_GRACE = 3.0  # seconds between a polite end and a forced one


class ClusterError(RuntimeError):
    """The cluster could not be brought up or used; the text says what to do."""


def tool(*command: str) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        ClusterError: with what the command said.
    """
    completed = subprocess.run([program(command[0]), *command[1:]], capture_output=True, text=True, check=False)
    if completed.returncode:
        raise ClusterError(f"{' '.join(command)}: {(completed.stderr or completed.stdout).strip()}")
    return completed.stdout


def namespaces(prefix: str) -> list[str]:
    """The namespaces whose names begin with ``prefix``."""
    names = [line.split()[0] for line in tool("ip", "netns", "list").splitlines() if line]
    return sorted(name for name in names if name.startswith(prefix))


def make_switch(namespace: str) -> None:
    """A namespace for the switch, with no way out of it."""
    tool("ip", "netns", "add", namespace)


def make_host(namespace: str, switch: str, port: str, address: str, mbit: float) -> None:
    """A namespace with ``eth0`` at ``address``; its link ends in a port of the switch and carries ``mbit`` to it."""
    tool("ip", "netns", "add", namespace)
    tool("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    tool("ip", "-n", namespace, "address", "add", address, "dev", "eth0")
    for place, device in ((namespace, "lo"), (namespace, "eth0"), (switch, port)):
        tool("ip", "-n", place, "link", "set", device, "up")
    _limit(namespace, "eth0", mbit)


def bridge(switch: str, ports: Sequence[str], mbit: float) -> None:
    """Join the ports; each carries ``mbit`` down to its host."""
    tool("ip", "-n", switch, "link", "add", _BRIDGE, "type", "bridge")
    tool("ip", "-n", switch, "link", "set", _BRIDGE, "up")
    for port in ports:
        tool("ip", "-n", switch, "link", "set", port, "master", _BRIDGE)
        _limit(switch, port, mbit)


def _limit(place: str, device: str, mbit: float) -> None:
    """Let a device send ``mbit`` Mbit/s, all headers included.

    TCP hands down no more at once than the link sends at once: more would be cut into packets by the processors, which
    on real hosts a network card does.
    """
    burst = max(_LEAST_BURST, int(mbit * 1e6 / 8 * _BURST))
    tool("ip", "-n", place, "link", "set", device, "gso_max_size", str(min(burst, _MOST_AT_ONCE)))
    rate = ("rate", f"{mbit}mbit", "burst", f"{burst}b", "latency", _QUEUE)
    tool("tc", "-n", place, "qdisc", "add", "dev", device, "root", "tbf", *rate)


def remove(names: Iterable[str]) -> None:
    """End what runs in these namespaces and delete them with their links."""
    present = list(names)
    end_processes(present)
    for name in present:
        tool("ip", "netns", "delete", name)


def processes(names: Iterable[str]) -> set[int]:
    """Process ids of all that runs in these namespaces."""
    return {int(pid) for name in names for pid in tool("ip", "netns", "pids", name).split()}


def end_processes(names: Sequence[str], keep: Iterable[int] = ()) -> None:
    """End all processes of these namespaces but those to keep: politely, and after a while by force."""
    kept = frozenset(keep)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE
        _signal(processes(names) - kept, number)
        while processes(names) - kept:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    raise ClusterError(f"processes {sorted(processes(names) - kept)} could not be ended")


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists, and has not ended unnoticed by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
