"""The end of a process that a nursery bore."""

import atexit
import os
import sys
import threading


def leave(status: int) -> None:
    """End as an interpreter does, but for taking a thousand modules apart, which is a third of a short run's time."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)
