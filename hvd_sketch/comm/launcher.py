"""What the launcher that started this process says of it, in its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hvd_sketch.errors import ConfigurationError

_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "HOROVOD_SIZE": "horovodrun",
    "WORLD_SIZE": "torchrun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
_RANKS = {"PMIX_RANK": "a launcher with PMIx", "PMI_RANK": "a launcher with PMI", "SLURM_PROCID": "srun"}
"""Those that tell of others only where they are above 0."""

_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "HOROVOD_SIZE")


def launched_with_mpi(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher of MPI or Horovod says there are, or MPI itself where it is in use already."""
    return max(_mpi_size(), *(_number(environment, variable) for variable in _MPI))


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """At least how many processes were started together, and what says so; 1 where nothing does."""
    sizes = [(_number(environment, variable), f"{variable} of {name}") for variable, name in _SIZES.items()]
    ranks = [(_number(environment, variable) + 1, f"{variable} of {name}") for variable, name in _RANKS.items()]
    told = [(size, name) for (size, name) in (*sizes, *ranks) if name.split()[0] in environment]
    return max([*told, (1, "")], key=lambda each: each[0])


def on_host(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's number on its host, and how many there are."""
    ranks = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    sizes = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    rank, size = (
        next((_number(environment, variable) for variable in variables if variable in environment), 0)
        for variables in (ranks, sizes)
    )
    return rank, max(1, size)


def check_not_alone(size: int) -> None:
    """Refuse to train alone on every rank, which would be silent.

    Args:
        size: how many ranks are connected.

    Raises:
        ConfigurationError: when there is one, and a launcher has started more.
    """
    count, says = launched()
    if size > 1 or count == 1:
        return
    raise ConfigurationError(
        f"at least {count} processes were started together ({says}={os.environ[says.split()[0]]}), and this one is "
        "connected to no other: it would train alone. Under srun, give --mpi=pmix with an MPI that has PMIx, or start "
        "with mpirun; Horovod needs its MPI or horovodrun; torchrun connects groups of torch.distributed and not MPI, "
        "so start what needs MPI with mpirun. To train alone on purpose, give comm=hvd_sketch.SingleProcess() or "
        f"MPI.COMM_SELF, or unset {says.split()[0]}"
    )


def _number(environment: Mapping[str, str], variable: str) -> int:
    text = environment.get(variable, "")
    return int(text) if text.isdecimal() else 0


def _mpi_size() -> int:
    """Of MPI where mpi4py has begun it, else 1."""
    mpi = sys.modules.get("mpi4py.MPI")
    running = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    return int(mpi.COMM_WORLD.size) if mpi is not None and running else 1
