"""Communicators: one file a backend, imported only when used."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.comm.single import SingleProcess
from hvd_sketch.errors import ConfigurationError

__all__ = ["Communicator", "Pending", "SingleProcess", "as_communicator", "default_communicator", "has_horovod"]

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE")


def has_horovod() -> bool:
    """Whether Horovod with its PyTorch part is installed; does not import it."""
    return _installed("horovod")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules[package] is None, which forbids to import it
        return False


def default_communicator(process_set: Any = None) -> Communicator:
    """Horovod where it is installed, else mpi4py under a launcher, else a single process.

    Raises:
        ConfigurationError: when a launcher started several processes and neither Horovod nor
            mpi4py is there to connect them; training alone on every rank would be silent.
    """
    if has_horovod():
        from hvd_sketch.comm.horovod import HorovodCommunicator

        return HorovodCommunicator(process_set)
    launched = max(int(os.environ.get(variable, "1")) for variable in _SIZE_VARIABLES)
    if launched == 1:
        return SingleProcess()
    if not _installed("mpi4py"):
        raise ConfigurationError(
            f"{launched} processes were launched but neither Horovod nor mpi4py is installed; "
            "install one of them: pip install mpi4py"
        )
    from hvd_sketch.comm.mpi import MpiCommunicator

    return MpiCommunicator()


def as_communicator(comm: Any) -> Communicator:
    """Accept one of our communicators or an mpi4py intracommunicator.

    Raises:
        ConfigurationError: for anything else.
    """
    if isinstance(comm, Communicator):
        return comm
    if type(comm).__module__.startswith("mpi4py"):
        from hvd_sketch.comm.mpi import MpiCommunicator

        return MpiCommunicator(comm)
    raise ConfigurationError(f"comm must be an mpi4py communicator or a hvd_sketch.comm.Communicator, got {comm!r}")
