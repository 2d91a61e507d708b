"""Nobody waits for ever: not for a rank that has ended, and not for one that does not come."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.faults import __main__ as faults
from benchmarks.faults.worker import THROUGH_DDP
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.comm.patience import VARIABLE, limit_of, ranks, wait_until
from hvd_sketch.errors import ConfigurationError, RankLostError
from tests.support import ranks as support


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan"])
def test_a_limit_is_a_positive_number_of_seconds(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_of(7) == 7.0
    monkeypatch.setenv(VARIABLE, "12.5")
    assert (limit_of(None), limit_of(3.0)) == (12.5, 3.0)
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(ConfigurationError, match=f"{VARIABLE} must be a positive number of seconds, got '{given}'"):
        limit_of(None)


def test_a_wait_ends_with_what_is_awaited_with_an_error_or_with_the_limit() -> None:
    turns = iter(range(1000))
    assert wait_until(lambda: next(turns) == 5, lambda share: None, 60.0)
    shares: list[float] = []
    assert not wait_until(lambda: False, shares.append, 0.05)
    assert shares == sorted(shares)
    assert shares[-1] >= 1.0

    def look(share: float) -> None:
        raise RankLostError("rank 1")

    with pytest.raises(RankLostError):
        wait_until(lambda: False, look, 60.0)
    assert ranks([2]) == "rank 2"
    assert ranks(range(20, 0, -1)) == "ranks 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 10 more"


def told(group: InProcessGroup, silent: bool) -> list[str]:
    """What ranks 0 and 2 hear when rank 1 does not come to their second collective."""
    errors = ["", "", ""]
    done = [False]

    def body(comm: Communicator) -> None:
        comm.occupation = "step 7"
        comm.allreduce(torch.ones(3), "first")
        if comm.rank == 1:
            while silent and not (errors[0] and errors[2]):
                time.sleep(0.01)
            done[0] = True
            return
        try:
            comm.allgather(torch.ones(3), "second")
        except RankLostError as error:
            errors[comm.rank] = str(error)

    group.run(body)
    assert done[0]
    return errors


def test_threads_are_told_who_is_missing_and_can_go_on() -> None:
    group = InProcessGroup(3, timeout=0.5)
    for _ in range(2):  # a group lasts
        ended = told(group, silent=False)
        assert ended[0] == (
            "rank 0: waits in allgather second of step 7 for rank 1, which ended without an error: all must take the "
            "same number of steps"
        )
        assert ended[2] == ended[0].replace("rank 0", "rank 2")
    late = told(group, silent=True)  # whoever gives up first leaves the other one
    assert any(f"rank {rank}: waited 0.5 s in allgather second of step 7 for rank" in late[rank] for rank in (0, 2))


def test_torchrun_ends_the_others_when_a_rank_is_killed() -> None:
    """They are told by Gloo, unless torchrun is faster."""
    if support.quick:
        pytest.skip("starts processes")
    outcome = faults.run(THROUGH_DDP, "SIGKILL between the rounds")
    assert outcome.seconds is not None, "hangs"
    assert not any("end" in said for said in outcome.said)
    for error in (said["error"] for said in outcome.said if "error" in said):
        assert "lost the others in alltoall hvd_sketch.all.1.up0 of step 3" in error


@pytest.mark.parametrize(
    ("backend", "fault", "said"),
    [
        ("mpi4py", "one step() fewer", "for rank 1, which ended without an error"),
        (
            "mpi4py",
            "SIGSTOP, longer than the limit",
            "waited 10 s in alltoall hvd_sketch.all.1.up0 of step 3 for rank 1",
        ),
        ("CSER", "Ctrl-C", "for rank 1, which ended by KeyboardInterrupt"),
        ("overlap", "one step() fewer", "for rank 1, which ended without an error"),
        ("Horovod over MPI", "an exception", "was in allreduce hvd_sketch.0.1.dense of step 3"),
        (
            "Horovod over Gloo",
            "SIGSTOP, longer than the limit",
            "waited 10 s in alltoall hvd_sketch.0.1.up0 of step 3",
        ),
    ],
)
def test_processes_are_told_and_end(backend: str, fault: str, said: str) -> None:
    if support.quick:
        pytest.skip("starts processes")
    outcome = faults.run(backend, fault)
    assert outcome.seconds is not None, "hangs"
    for rank in (0, 2):
        assert said in outcome.said[rank]["error"]
