"""The launch scripts, run as a user runs them; SLURM's own commands are played by two small scripts."""

import os
import sys
from pathlib import Path

import pytest

from tests.support import nursery
from tests.support.ranks import ROOT, Completed, run

SCRIPTS = ROOT / "mpi_scripts"
TRAINING = """
import os, sys
import horovod.torch as hvd, torch
hvd.init()
total = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
optimizer = "hvd_sketch" if hasattr(hvd.DistributedOptimizer, "stock") else "horovod"
threads = os.environ["OMP_NUM_THREADS"]
line = f"rank {hvd.rank()} sums {total:g} with {optimizer}, {threads} threads, got {sys.argv[1:]}"
with open(f"{os.environ['TOLD']}.{hvd.rank()}", "w") as told:
    told.write(line)
"""
SHARE = max(len(os.sched_getaffinity(0)) // 2, 1)  # of the cores, for each of two ranks
SRUN = """#!/bin/sh
[ "$1" = --mpi=list ] && { echo "MPI plugin types are... $PLUGINS"; exit; }
echo "srun $1 $2"
shift 2
[ "$PLUGINS" = "pmix of another MPI" ] && exec env SLURM_STEP_NUM_TASKS=2 "$@"
exec mpirun -np 2 --oversubscribe "$@"
"""
SCONTROL = """#!/bin/sh
echo localhost
"""


@pytest.fixture
def training(tmp_path: Path) -> Path:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    return script


def two_ranks_ran(completed: Completed, training: Path, optimizer: str = "horovod", threads: int = SHARE) -> None:
    assert completed.returncode == 0, completed.output
    for rank in range(2):
        told = training.with_name(f"told.{rank}").read_text()
        assert told == f"rank {rank} sums 2 with {optimizer}, {threads} threads, got ['--its', 'own args']"


def environment(training: Path, **more: str) -> dict[str, str]:
    return {"TOLD": str(training.with_name("told")), "OMP_NUM_THREADS": "", **more}


def test_one_machine(training: Path) -> None:
    command = (str(SCRIPTS / "one_machine.sh"), "2", str(training), "--its", "own args")
    two_ranks_ran(run(command, env=environment(training)), training)


def test_compression_and_threads_reach_the_ranks(training: Path) -> None:
    command = (str(SCRIPTS / "one_machine.sh"), "2", str(training), "--its", "own args")
    env = environment(training, COMPRESSION="topk", RATIO="10", OMP_NUM_THREADS="3")
    two_ranks_ran(run(command, env=env), training, "hvd_sketch", 3)


@pytest.mark.parametrize("interface", ["", "lo"])
def test_host_file(training: Path, interface: str) -> None:
    hosts = training.with_name("hosts")
    hosts.write_text("localhost slots=2\n")
    command = (str(SCRIPTS / "hostfile.sh"), str(hosts), str(training), "--its", "own args")
    env = environment(training, INTERFACE=interface, RATIO="10")
    two_ranks_ran(run(command, env=env), training, "hvd_sketch")


def test_what_far_sets_is_known_to_open_mpi() -> None:
    of_mpi = ("ompi_info", "--parsable", "--level", "9", "--param", "all", "all")
    told = run(("bash", "-c", f". {SCRIPTS / 'environment.sh'}; {' '.join(of_mpi)}"), env={"FAR": "1"})
    assert "coll_libnbc_iallreduce_algorithm:value:rabenseifner" in told.output
    assert "btl_tcp_eager_limit:value:1048576" in told.output


@pytest.mark.parametrize("plugins", ["pmix", "pmix of another MPI", "none"])
def test_slurm(training: Path, plugins: str) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        training.with_name(name).write_text(text)
        training.with_name(name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "2"}
    folders = (str(training.parent), nursery.folder(), str(Path(sys.executable).parent), os.environ["PATH"])
    env = environment(training, **job, SLURM_CPUS_PER_TASK="3", PLUGINS=plugins, PATH=os.pathsep.join(folders))
    completed = run(("bash", str(SCRIPTS / "slurm.sbatch"), str(training), "--its", "own args"), env=env)
    assert ("srun --mpi=pmix --cpus-per-task=3" in completed.output) == (plugins == "pmix")
    assert ("srun --mpi=pmix connects no ranks here" in completed.output) == (plugins == "pmix of another MPI")
    two_ranks_ran(completed, training, threads=3)


@pytest.mark.parametrize(
    ("script", "arguments", "missing"),
    [
        ("one_machine.sh", ("train.py",), "NP is the number of processes"),
        ("one_machine.sh", ("0", "train.py"), "NP is the number of processes"),
        ("hostfile.sh", ("/no/such/file", "train.py"), "a machine a line"),
        ("slurm.sbatch", (), "script.py"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(script: str, arguments: tuple[str, ...], missing: str) -> None:
    completed = run(("bash", str(SCRIPTS / script), *arguments))
    assert completed.returncode == 2
    assert completed.output.startswith("usage: ")
    assert missing in completed.output
    assert completed.output.count("\n") == 1
