"""The life of a cluster: bring it up, run commands on it, take it down whatever happens."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from benchmarks.cluster import delayed, network, sshd
from benchmarks.cluster.launchers import search_path
from benchmarks.cluster.network import ClusterError
from benchmarks.cluster.requirements import missing, program

STATE = Path("/run/hvd_sketch_cluster")
_MOST_HOSTS = 200
_LONGEST_DELAY = 10_000.0  # milliseconds: with more, nothing could be reached before the cluster gives up
_NOBODY = 0  # owns a cluster that stays up
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cluster:
    """Hosts h1 … hN, each with its own name, network, sshd and temporary folder; one switch between them.

    Files, processors and memory are the machine's own, shared by all hosts. As a context manager the cluster is
    taken down at the end, also after an exception, Ctrl-C, SIGTERM or SIGHUP; what a killed process left behind is
    removed by the next cluster of that name, or by `take_down`.

    Args:
        hosts: number of hosts.
        mbit: what each host's link carries, Mbit/s in each direction.
        name: several clusters may be up at a time under different names.
        delay: milliseconds that a message takes to any other host, besides its time on the links.

    Raises:
        ClusterError: when the numbers make no sense, or when brought up: the machine lacks something, or a cluster of
            that name is up already.
    """

    def __init__(self, hosts: int, mbit: float, name: str = "main", *, delay: float = 0.0) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise ClusterError(f"hosts must be between 1 and {_MOST_HOSTS}, got {hosts}")
        if not mbit > 0:
            raise ClusterError(f"mbit must be above 0, got {mbit}")
        if not 0 <= delay < _LONGEST_DELAY:
            raise ClusterError(f"delay must be at least 0 and below {_LONGEST_DELAY} ms, got {delay}")
        if not name.isalnum():
            raise ClusterError(f"the name of a cluster must consist of letters and digits, got {name!r}")
        self.mbit, self.delay, self.name = mbit, delay, name
        self.hosts = [f"h{number}" for number in range(1, hosts + 1)]
        self._folder = STATE / name
        self._listeners: dict[str, int] = {}
        self._handlers: dict[signal.Signals, Any] = {}

    @classmethod
    def running(cls, name: str = "main") -> Cluster | None:
        """The cluster of this name that `up` left running, or None."""
        folder = STATE / name
        if _owner(folder) != _NOBODY or not (folder / "state.json").exists():
            return None
        state = json.loads((folder / "state.json").read_text())
        cluster = cls(state["hosts"], state["mbit"], name, delay=state["delay"])
        cluster._listeners = state["listeners"]
        return cluster

    def up(self, *, stay: bool = True) -> None:
        """Bring the cluster up; with ``stay`` it outlives this process."""
        if problems := missing(compiler=self.delay > 0):
            raise ClusterError("no cluster on this machine:\n  " + "\n  ".join(problems))
        self._claim(owner=_NOBODY if stay else os.getpid())
        switch = self._namespace("switch")
        network.make_switch(switch)
        ports = [f"port{number}" for number in range(1, len(self.hosts) + 1)]
        for number, (host, port) in enumerate(zip(self.hosts, ports, strict=True), start=1):
            network.make_host(self._namespace(host), switch, port, f"{sshd.address(number)}/24", self.mbit)
        if self.delay:
            delayed.start(self._folder, switch, ports, self.mbit, self.delay, stay=stay)
        else:
            network.bridge(switch, ports, self.mbit)
        sshd.write_shared(self._folder, self.hosts)
        for host in self.hosts:
            self._listeners[host] = sshd.start(self._folder, host, self._namespace(host))
        state = {"hosts": len(self.hosts), "mbit": self.mbit, "delay": self.delay, "listeners": self._listeners}
        (self._folder / "state.json").write_text(json.dumps(state))
        self._wait_until_reachable()

    def down(self) -> None:
        """End all processes on the hosts and remove every trace; does nothing when nothing is there."""
        take_down(self.name)
        self._listeners.clear()

    def __enter__(self) -> Cluster:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, _leave) for number in _ENDING if number != signal.SIGINT}
        atexit.register(self.down)
        try:
            self.up(stay=False)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, AlreadyUpError):
            self.down()
        atexit.unregister(self.down)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(
        self,
        command: Sequence[str],
        *,
        host: str = "h1",
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        output: IO[str] | None = None,
    ) -> int:
        """Run a command on one host, in this process's folder, and return its exit status.

        ``PATH`` begins with this Python's folder, and every rank gets one thread.

        Raises:
            subprocess.TimeoutExpired: after ``timeout`` seconds; what it had started on any host was ended.
        """
        process = subprocess.Popen(
            [*self._inside(host), "env", "-C", os.getcwd(), *command],
            env={**os.environ, **self._environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
        )
        try:
            return process.wait(timeout)
        finally:
            with _undisturbed():
                network.end_processes([self._namespace(name) for name in self.hosts], keep=self._listeners.values())
                process.wait()

    def _inside(self, host: str) -> list[str]:
        return [program("nsenter"), "--target", str(self._listeners[host]), "--net", "--mount", "--uts"]

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": search_path(),
            "TMPDIR": str(self._folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def _namespace(self, place: str) -> str:
        return f"{_prefix(self.name)}{place}"

    def _claim(self, owner: int) -> None:
        """Make the cluster's folder, unless a cluster of that name is in use; clear away one whose process died."""
        previous = _owner(self._folder)
        if previous == _NOBODY or (previous is not None and network.is_alive(previous)):
            raise AlreadyUpError(
                f"a cluster named {self.name!r} is up"
                + (f" for process {previous}" if previous != _NOBODY else "")
                + f"; take it down with: python -m benchmarks.cluster down --name {self.name}"
            )
        take_down(self.name)
        self._folder.mkdir(mode=0o700, parents=True)
        (self._folder / "owner").write_text(str(owner))

    def _wait_until_reachable(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        for host in self.hosts:
            while not self._reaches(host, max(1.0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    log = sshd.log(self._folder, host)
                    raise ClusterError(f"{host} cannot be reached from h1 by ssh; its sshd says:\n{log}")
                time.sleep(0.1)

    def _reaches(self, host: str, seconds: float) -> bool:
        command = [*self._inside("h1"), "ssh", host, "true"]
        try:
            return subprocess.run(command, capture_output=True, timeout=seconds, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False


class AlreadyUpError(ClusterError):
    """A cluster of that name belongs to somebody else, and stays."""


def take_down(name: str) -> None:
    """Remove what there is of a cluster: processes, namespaces, links and files; signals wait until it is done."""
    with _undisturbed():
        network.remove(network.namespaces(_prefix(name)))
        shutil.rmtree(STATE / name, ignore_errors=True)
        if STATE.is_dir() and not any(STATE.iterdir()):
            STATE.rmdir()


def _owner(folder: Path) -> int | None:
    """The process that a cluster belongs to; None where there is no cluster."""
    file = folder / "owner"
    return int(file.read_text() or _NOBODY) if file.exists() else None


def _prefix(name: str) -> str:
    return f"hvdsketch-{name}-"


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _undisturbed() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
