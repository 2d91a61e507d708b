"""Processes that were started together and are connected to nobody do not train alone in silence."""

from __future__ import annotations

import sys

import pytest

from hvd_sketch.comm import SingleProcess, default_communicator, launcher
from hvd_sketch.errors import ConfigurationError
from tests.support.ranks import run

LAUNCHED = [
    ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ({"PMI_SIZE": "4"}, 4),
    ({"HOROVOD_SIZE": "2"}, 2),
    ({"WORLD_SIZE": "8", "RANK": "0"}, 8),
    ({"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "1"}, 5),
    ({"PMIX_RANK": "2"}, 3),
    ({"SLURM_PROCID": "1"}, 2),
]
ALONE = [{}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"PMIX_RANK": "0"}, {"SLURM_NTASKS": "8"}, {"WORLD_SIZE": "many"}]


@pytest.mark.parametrize(("environment", "count"), LAUNCHED)
def test_every_launcher_is_believed(environment: dict[str, str], count: int) -> None:
    assert launcher.launched(environment)[0] == count


@pytest.mark.parametrize("environment", ALONE)
def test_what_tells_of_no_other_process_is_not_believed(environment: dict[str, str]) -> None:
    """SLURM_NTASKS is that of a batch script as well, of which there is one."""
    assert launcher.launched(environment)[0] == 1


@pytest.mark.parametrize("environment", [environment for environment, _ in LAUNCHED])
def test_a_process_that_is_connected_to_nobody_is_told(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    launcher.check_not_alone(2)
    with pytest.raises(ConfigurationError, match="connected to no other: it would train alone. Under srun"):
        launcher.check_not_alone(1)


def test_mpi_is_asked_for_the_size_and_not_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under PMIx without Horovod; this MPI was not started by it, and is alone."""
    monkeypatch.setitem(__import__("sys").modules, "horovod", None)
    assert isinstance(default_communicator(), SingleProcess)
    monkeypatch.setenv("PMIX_RANK", "1")
    monkeypatch.setenv("PMIX_NAMESPACE", "job")
    with pytest.raises(ConfigurationError, match=r"at least 2 processes were started together \(PMIX_RANK of"):
        default_communicator()


TRIES = """
import hvd_sketch as hvd, torch

hvd.init()
for compression in (hvd.Compression.none, hvd.Compression.fp16, hvd.Compression.topk(ratio=2.0)):
    model = torch.nn.Linear(30, 40)
    try:
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), compression
        )
        model(torch.ones(2, 30)).sum().backward()
        optimizer.step()
    except hvd.ConfigurationError as error:
        print(f"<told: {error}>")
"""


def test_a_process_with_horovod_is_told_as_well() -> None:
    ended = run((sys.executable, "-c", TRIES), env={"SLURM_STEP_NUM_TASKS": "3"}, timeout=60)
    assert ended.output.count("<told: at least 3 processes were started together (SLURM_STEP_NUM_TASKS") == 3, ended


OVER_MPI = """
import torch, hvd_sketch as hvd
from mpi4py import MPI

model = torch.nn.Linear(30, 40)
sgd = torch.optim.SGD(model.parameters(), 0.1)
makes = {
    "AsyncSGD": lambda comm: hvd.AsyncSGD(sgd, model, comm, server_works=True),
    "a server": lambda comm: hvd.AsyncSGD(sgd, model, comm, server_works=comm == MPI.COMM_SELF),
    "SwarmSGD": lambda comm: hvd.SwarmSGD(sgd, model=model, comm=comm),
    "DecentLaM": lambda comm: hvd.DecentLaM(sgd, model, comm),
    "LocalSGD": lambda comm: hvd.LocalSGD(sgd, model, comm),
    "DistributedOptimizer": lambda comm: hvd.DistributedOptimizer(sgd, model.named_parameters(), comm=comm),
}
for name, make in makes.items():
    try:
        make(MPI.COMM_WORLD)
    except hvd.ConfigurationError as error:
        print(f"<{name} is told: {error}>")
    make(MPI.COMM_SELF)
print("all train alone when asked to")
"""


def test_mpi_of_one_process_is_not_taken_for_the_ranks_of_torchrun() -> None:
    """A script that torchrun starts, and that gives it, would train as many models as there are ranks."""
    ended = run((sys.executable, "-c", OVER_MPI), env={"WORLD_SIZE": "3", "RANK": "0"}, timeout=100)
    told = " is told: at least 3 processes were started together (WORLD_SIZE"
    assert ended.output.count(told) == 6, ended
    assert ended.output.count("start what needs MPI with mpirun") == 6
    assert "all train alone when asked to" in ended.output


def test_a_host_has_the_ranks_that_its_launcher_says() -> None:
    assert launcher.on_host({}) == (0, 1)
    assert launcher.on_host({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == (1, 4)
    assert launcher.on_host({"OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}) == (2, 3)
