"""Where a process stands among a server and its workers, and how another takes the place of one that died."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_sketch.errors import ConfigurationError

_TAG = 7


@dataclass(frozen=True)
class Place:
    """A rank among ``size``, and how others are reached.

    Attributes:
        rank: of this process, or of the one that it replaces.
        size: number of ranks.
        comm: an mpi4py intracommunicator; of a replacement its own alone.
        way: of a replacement the intercommunicator to the server.
    """

    rank: int
    size: int
    comm: Any
    way: Any = None


def place(comm: Any = None) -> Place:
    """This process's place in a communicator, ``MPI.COMM_WORLD`` by default.

    A process that the server started in place of a lost worker, see ``restarts`` of `AsyncSGD`, gets
    that worker's rank. So a script that is to be started again asks here for its rank, and hands on
    the place as the communicator.

    Raises:
        ConfigurationError: for what is no mpi4py intracommunicator.
    """
    from mpi4py import MPI

    if isinstance(comm, Place):
        return comm
    parent = MPI.Comm.Get_parent()
    if comm is None and parent != MPI.COMM_NULL:
        told = np.empty(2, np.int64)
        parent.Recv(told, source=0, tag=_TAG)
        return Place(int(told[0]), int(told[1]), MPI.COMM_SELF, parent)
    comm = MPI.COMM_WORLD if comm is None else comm
    if not isinstance(comm, MPI.Intracomm):
        raise ConfigurationError(f"comm must be an mpi4py intracommunicator, got {comm!r}")
    return Place(comm.rank, comm.size, comm)


class Restarts:
    """Starts this process's command line again for workers that are lost, so often for each.

    MPI starts it (``MPI_Comm_spawn``) where it finds a slot, in a thread: nobody waits for that.

    Args:
        attempts: for each worker.
        size: number of ranks.
        reach: told of the rank and the way to its new process.
    """

    def __init__(self, attempts: int, size: int, reach: Callable[[int, Any], None]) -> None:
        self._attempts, self._size, self._reach = attempts, size, reach
        self._begun: dict[int, int] = {}
        self.failed: set[int] = set()

    def begin(self, worker: int) -> bool:
        """Start a worker again; whether it may still be."""
        self._begun[worker] = self._begun.get(worker, 0) + 1
        if self._begun[worker] > self._attempts:
            return False
        threading.Thread(target=self._start, args=(worker,), name="hvd_sketch restart", daemon=True).start()
        return True

    def _start(self, worker: int) -> None:
        from mpi4py import MPI

        try:
            way = MPI.COMM_SELF.Spawn(sys.executable, sys.orig_argv[1:])
        except MPI.Exception as error:
            warnings.warn(f"worker {worker} could not be started again: {error}", RuntimeWarning, stacklevel=2)
            self.failed.add(worker)
            return
        way.Send(np.array([worker, self._size], np.int64), dest=0, tag=_TAG)
        self._reach(worker, way)
