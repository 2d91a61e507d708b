"""Sums as direct messages: the sums of any other collective, the same bits on all ranks, the same bytes."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_sketch as hvd
from hvd_sketch.comm import Communicator, as_communicator, default_communicator
from hvd_sketch.comm.delay import VARIABLE, agreed_crossing
from hvd_sketch.comm.direct import Direct, pays
from hvd_sketch.comm.horovod import HorovodCommunicator
from hvd_sketch.comm.in_process import InProcess, run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.errors import ConfigurationError
from tests.comm import test_backends
from tests.support.compressors import EVERY, TABLE, TOTAL, conserved
from tests.support.ranks import Launcher, ranks
from tests.support.simulation import Run, drive, heavy_tailed

SIZE, STEPS, FAR = 3, 6, 0.05
ROUNDED_ON_THE_WAY = ("sketch, half", "sketch, five rows", "sketch, buckets", "sketch, in turn")
"""Those of which some sums are rounded in half precision, once or at every rank."""
HEADER_RIDES = ("sharded", "sharded, buckets", "auto")
"""Those that send something in vain in a void step; see test_sharded_far.py for their bytes."""


@pytest.mark.parametrize(
    ("members", "crossing", "expected"),
    [(1, 1.0, False), (2, 0.04, True), (8, 0.001, False), (8, 0.04, True), (512, 0.004, True), (4096, 0.004, False)],
)
def test_they_are_chosen_where_messages_take_long_and_are_not_too_many(
    members: int, crossing: float, expected: bool
) -> None:
    assert pays(members, crossing) == expected


def far(comm: Communicator) -> Communicator:
    comm.crossing = FAR
    assert comm._direct is not None
    return comm


@pytest.mark.parametrize("size", [2, 3, 5])
def test_they_are_the_same_collectives(size: int) -> None:
    assert all(run_in_process(size, lambda comm: test_backends.check(far(comm))))


class InARing(InProcess):
    gathers_by_ring = True

    def post_allgather(self, tensor: Tensor, name: str) -> Any:
        raise AssertionError("it would go around the ring")


def test_where_a_gather_is_a_ring_everybody_is_sent_a_copy() -> None:
    def body(comm: Any) -> bool:
        comm.__class__ = InARing
        return test_backends.check(far(comm))

    assert all(run_in_process(3, body))


def test_half_precision_is_rounded_once() -> None:
    values = torch.randn(7, 1001, generator=torch.Generator().manual_seed(0)).half()

    def body(comm: Communicator) -> Tensor:
        total = values[comm.rank].clone()
        far(comm).allreduce(total, "halves")
        return total

    exact = values[0].float()
    for one in values[1:]:
        exact += one
    assert all(torch.equal(total, exact.half()) for total in run_in_process(7, body))


def test_the_second_messages_of_all_sums_under_way_leave_together() -> None:
    """So many sums take two delays, not one more for each."""

    def body(comm: Communicator) -> list[str]:
        posted: list[str] = []
        posts = noting(posted, comm.post_alltoall), noting(posted, comm.post_allgather)
        direct = Direct(comm.size, *posts, begin_all=lambda: None)
        begun = [direct.post_sum(torch.ones(5), name) for name in "abc"]
        begun[1].wait()
        late = direct.post_sum(torch.ones(5), "d")
        for pending in (*begun, late):
            assert torch.equal(pending.wait(), torch.full((5,), float(comm.size)))
        return posted

    def noting(posted: list[str], post: Any) -> Any:
        def noted(tensor: Tensor, name: str) -> Any:
            posted.append(name)
            return post(tensor, name)

        return noted

    together = ["a.parts", "b.parts", "c.parts", "a.sums", "b.sums", "c.sums", "d.parts", "d.sums"]
    assert run_in_process(3, body) == [together] * 3


@EVERY
def test_an_exchange_is_as_over_any_other_sum(compressor: Compressor) -> None:
    """Also through a step that is void."""
    gradients = heavy_tailed(SIZE, STEPS, TOTAL)
    gradients[1, 3, 100] = torch.nan

    def runs(direct: bool) -> list[Run]:
        return run_in_process(
            SIZE, lambda comm: drive(far(comm) if direct else comm, compressor, gradients[comm.rank])
        )

    direct, plain = runs(True), runs(False)
    assert all(torch.equal(run.updates.nan_to_num(9.0), direct[0].updates.nan_to_num(9.0)) for run in direct)
    if compressor not in [TABLE[name] for name in HEADER_RIDES]:
        assert [run.exchange.stats.bytes_sent for run in direct] == [run.exchange.stats.bytes_sent for run in plain]
    valid = [0, 1, 2, 4, 5]
    assert bool(direct[0].updates[3].isnan().all())
    assert conserved([Run(run.updates[valid], run.exchange) for run in direct], gradients[:, valid])
    if compressor not in [TABLE[name] for name in ROUNDED_ON_THE_WAY]:
        assert torch.allclose(direct[0].updates[valid], plain[0].updates[valid], rtol=1e-6, atol=1e-6)


def test_all_ranks_agree_on_the_longest_crossing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank is far from the others; on one host none is; and what a rank's environment says is what counts."""
    same = [True]
    monkeypatch.setattr("socket.gethostname", lambda: "here" if same[0] else threading.current_thread().name)

    def body(comm: Communicator) -> float:
        def alltoall(tensor: Tensor, name: str) -> Tensor:
            time.sleep(0.01 * (comm.rank == 1))
            return comm.alltoall(tensor, name)

        return agreed_crossing(alltoall, comm.size)

    assert run_in_process(3, body) == [0.0] * 3
    same[0] = False
    first, *others = run_in_process(3, body)
    assert first >= 0.01
    assert others == [first] * 2
    monkeypatch.setenv(VARIABLE, "0.08")
    assert run_in_process(3, body) == [0.08] * 3
    monkeypatch.setenv(VARIABLE, "-1")
    with pytest.raises(ConfigurationError, match="HVD_SKETCH_CROSSING must be a number of seconds.*ranks 0, 1, 2"):
        run_in_process(3, body)


def test_the_first_line_says_how_long_messages_take_and_what_to_start_in_horovods_place() -> None:
    assert run_in_process(3, lambda comm: comm.remarks()) == [[]] * 3
    assert run_in_process(3, lambda comm: far(comm).remarks()) == [["messages take 50 ms; sums travel directly"]] * 3
    of_four = HorovodCommunicator(SimpleNamespace(size=lambda: 4, rank=lambda: 0))
    assert of_four.remarks() == []
    of_four.crossing = 0.04
    (remark,) = of_four.remarks()
    assert "2 (W-1) times that, 0.24 s" in remark
    assert "comm=MPI.COMM_WORLD of mpi4py, or start with torchrun" in remark


NAMES = ("sketch, buckets", "sharded, buckets", "topk", "powersgd")


def on_a_rank(use_mpi4py: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """The laws of collectives, and what some exchanges did."""
    hvd.init()
    if use_mpi4py:
        from mpi4py import MPI

        comm = as_communicator(MPI.COMM_WORLD)
    else:
        comm = default_communicator()
    assert test_backends.check(comm)
    assert comm.crossing == FAR
    assert comm._direct is not None
    gradients = heavy_tailed(comm.size, STEPS, TOTAL)[comm.rank]
    seen = {name: drive(comm, TABLE[name], gradients) for name in NAMES}
    return {name: (run.updates, run.residual) for name, run in seen.items()}


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_real_ranks_get_the_bits_of_ranks_in_one_process(launcher: Launcher) -> None:
    told = ranks(SIZE, on_a_rank, launcher == "mpirun", launcher=launcher, env={VARIABLE: str(FAR)})
    gradients = heavy_tailed(SIZE, STEPS, TOTAL)

    def in_process(comm: Communicator) -> dict[str, Run]:
        return {name: drive(far(comm), TABLE[name], gradients[comm.rank]) for name in NAMES}

    for seen, expected in zip(told, run_in_process(SIZE, in_process), strict=True):
        for name, (updates, residual) in seen.items():
            assert torch.equal(updates, expected[name].updates), name
            assert torch.equal(residual, expected[name].residual), name
