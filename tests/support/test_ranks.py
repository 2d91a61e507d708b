"""The launcher of the multi-process tests: results by rank, and no failure or hang that goes unseen."""

import os
import time

import pytest
import torch

from tests.support import nursery
from tests.support.ranks import Launcher, RanksFailed, RanksTimedOut, launch, ranks

pytestmark = pytest.mark.early


def gather_ranks(factor: float) -> tuple[int, torch.Tensor]:
    import horovod.torch as hvd

    hvd.init()
    return hvd.rank(), hvd.allgather(torch.tensor([factor * hvd.rank()]))


def fail_on_last_rank() -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
        raise ZeroDivisionError("only on the last rank")
    MPI.COMM_WORLD.barrier()


def die() -> None:
    os._exit(3)


def wait_for_ever() -> None:
    print("waiting for ever")
    while True:
        time.sleep(60)


MORE_THAN_CORES = (os.cpu_count() or 1) + 1


@pytest.mark.parametrize(
    ("count", "launcher"), [(MORE_THAN_CORES, "mpirun"), (2, "horovodrun-gloo"), (2, "horovodrun-mpi")]
)
def test_results_come_back_by_rank(count: int, launcher: Launcher) -> None:
    for rank, (told_rank, gathered) in enumerate(ranks(count, gather_ranks, 1.5, launcher=launcher)):
        assert told_rank == rank
        assert torch.equal(gathered, 1.5 * torch.arange(count))


def test_a_failing_rank_shows_its_traceback_and_ends_the_others() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2: Traceback.*in fail_on_last_rank.*only on the last rank"):
        ranks(2, fail_on_last_rank)


def test_a_rank_that_dies_without_a_word_is_a_failure() -> None:
    with pytest.raises(RanksFailed, match="exit status is 3"):
        ranks(2, die)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_a_hang_is_killed_and_shows_where_each_rank_stood(launcher: Launcher) -> None:
    both_stacks = r"(?s)rank 0 of 2:.*in wait_for_ever.*rank 1 of 2:.*in wait_for_ever"
    with pytest.raises(RanksTimedOut, match=both_stacks) as error:
        ranks(2, wait_for_ever, launcher=launcher, timeout=20)
    assert str(error.value).count("waiting for ever") == 2
    deadline = time.monotonic() + 10
    while nursery.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not nursery.alive()


def test_only_top_level_functions_can_be_launched() -> None:
    with pytest.raises(ValueError, match="top-level function"):
        ranks(2, lambda: None)


def test_a_command_line_is_launched_as_it_is() -> None:
    completed = launch(2, ["python", "-c", "import sys; print('said', sys.argv[1:])", "--its", "own args"])
    assert completed.returncode == 0
    assert completed.output.count("said ['--its', 'own args']") == 2
