"""Communicators: one file a backend, imported only when used."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Literal

from hvd_sketch.comm import torch as of_torch
from hvd_sketch.comm.base import Communicator, Pending, made_by
from hvd_sketch.comm.launcher import check_not_alone, launched, launched_with_mpi
from hvd_sketch.comm.single import SingleProcess
from hvd_sketch.errors import ConfigurationError

__all__ = [
    "Communicator",
    "Pending",
    "SingleProcess",
    "as_communicator",
    "chosen_backend",
    "default_communicator",
    "has_horovod",
    "is_connected",
    "is_installed",
]

Backend = Literal["horovod", "torch", "mpi", "single"]


def has_horovod() -> bool:
    """Whether Horovod with its PyTorch part is installed; does not import it."""
    return is_installed("horovod")


def is_installed(package: str) -> bool:
    """Whether a package can be imported; does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules[package] is None, which forbids to import it
        return False


def chosen_backend() -> Backend:
    """What connects this process with others: what is initialised already, or else what its launcher stands for.

    Horovod where it is initialised; torch.distributed where that is, or torchrun has started this process; Horovod
    where it is installed; mpi4py under another launcher; and nothing in a single process.
    """
    if _runs_horovod():
        return "horovod"
    if of_torch.is_initialized() or of_torch.is_launched(by_another=launched_with_mpi() > 1):
        return "torch"
    if has_horovod():
        return "horovod"
    return "mpi" if launched_with_mpi() > 1 or launched()[0] > 1 else "single"


def _runs_horovod() -> bool:
    horovod = sys.modules.get("horovod.torch")
    return horovod is not None and bool(horovod.is_initialized())


def is_connected() -> bool:
    """Whether the `default_communicator` can be made now: Horovod may be initialised later."""
    return chosen_backend() != "horovod" or _runs_horovod()


def default_communicator(process_set: Any = None) -> Communicator:
    """The communicator over all ranks, by the `chosen_backend`; torch.distributed is initialised if it is not.

    Raises:
        ConfigurationError: when a launcher started several processes and nothing connects them; training alone on
            every rank would be silent. Or for a ``process_set`` without Horovod.
    """
    backend = chosen_backend()
    if process_set is not None and backend != "horovod":
        raise ConfigurationError(
            "process_set is one of Horovod's, which does not connect these processes; under torchrun give a group, "
            "comm=torch.distributed.new_group(ranks)"
        )
    comm = _communicator_of(backend, process_set)
    check_not_alone(comm.world_size)
    return comm


def _communicator_of(backend: Backend, process_set: Any) -> Communicator:
    if backend == "horovod":
        from hvd_sketch.comm.horovod import HorovodCommunicator

        return HorovodCommunicator(process_set)
    if backend == "torch":
        if not of_torch.is_initialized():
            of_torch.initialize()
        return of_torch.TorchCommunicator()
    if backend == "single":
        return SingleProcess()
    if not is_installed("mpi4py"):
        raise ConfigurationError(
            f"{launched()[0]} processes were launched but neither Horovod nor mpi4py is installed; "
            "install one of them: pip install mpi4py; or launch with torchrun, which needs neither"
        )
    from hvd_sketch.comm.mpi import MpiCommunicator

    return MpiCommunicator()


def as_communicator(comm: Any) -> Communicator:
    """Accept one of our communicators, an mpi4py intracommunicator, or a group of torch.distributed.

    Raises:
        ConfigurationError: for anything else; and for MPI's world when a launcher started several processes that it
            does not connect, as torchrun does: each would train alone, silently.
    """
    if isinstance(comm, Communicator):
        return comm
    if type(comm).__module__.startswith("mpi4py"):
        from mpi4py import MPI

        from hvd_sketch.comm.mpi import MpiCommunicator

        if comm == MPI.COMM_WORLD:
            check_not_alone(MPI.COMM_WORLD.size)
        return MpiCommunicator(comm)
    group = of_torch.group_of(comm)
    if group is not None:
        return of_torch.TorchCommunicator(group)
    raise ConfigurationError(
        "comm must be an mpi4py communicator, a process group of torch.distributed, a mesh of one dimension, or a "
        f"hvd_sketch.comm.Communicator, got {comm!r}"
    )


made_by(default_communicator)
