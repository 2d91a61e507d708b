"""Nodes that die in the middle of a meeting, stop and come back, or end by an error of their own."""

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_sketch.errors import RankLostError, RankMismatchError
from hvd_sketch.methods.gossip.decentlam import DmSGD
from hvd_sketch.methods.swarm import PeerLost
from tests.methods.swarm.test_optimizer import RATE, Vector, swarm_of, train
from tests.support.ranks import in_turn, launch, python, ranks

VICTIM = 2
ORPHANS_LIVE = {"OMPI_MCA_orte_enable_recovery": "1"}  # what mpirun's --enable-recovery sets


def die_when_met(folder: str, on_lost: Any, blocking: bool) -> None:
    """On 4 ranks: the victim kills itself when it has taken a neighbour's model in and has not answered yet."""
    from mpi4py import MPI

    comm, model, told = MPI.COMM_WORLD, Vector(torch.full((100,), float(MPI.COMM_WORLD.rank))), ""
    optimizer = swarm_of(model, comm, rate=0.0, patience=5.0, on_lost=on_lost, blocking=blocking)
    if comm.rank == VICTIM:
        optimizer._meetings._node.answer = lambda header, message: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        with optimizer:
            train(optimizer, model, 40)
            with optimizer.average_model():
                average = model.x.detach().clone()
            told = f"carried on to {average.min():.3f} … {average.max():.3f}"
    except PeerLost as error:
        told = str(error)
    stats = optimizer.stats
    Path(folder, str(comm.rank)).write_text(json.dumps([told, stats.meetings, stats.void, stats.unanswered]))


def survivors_of(folder: Path, on_lost: str, blocking: bool) -> dict[int, list[Any]]:
    program = f"from {__name__} import die_when_met; die_when_met({str(folder)!r}, {on_lost!r}, {blocking})"
    launch(4, python("-c", program), env=ORPHANS_LIVE, timeout=250)
    return {int(file.name): json.loads(file.read_text()) for file in folder.iterdir()}


@pytest.mark.parametrize("blocking", [False, True])
def test_the_partners_of_a_node_that_dies_mid_meeting_carry_on(tmp_path: Path, blocking: bool) -> None:
    told = survivors_of(tmp_path, "continue", blocking)
    assert sorted(told) == [0, 1, 3]
    for text, meetings, void, unanswered in told.values():
        assert text.startswith("carried on")
        assert meetings + void + unanswered == 40  # every step's; among live nodes only those that cross are void
        assert meetings > 0
    assert sum(unanswered for *_, unanswered in told.values()) >= 1
    assert len({text for text, *_ in told.values()}) == 1  # they agree on the average model


def test_the_partners_of_a_node_that_dies_mid_meeting_end_with_a_clear_error(tmp_path: Path) -> None:
    told = survivors_of(tmp_path, "raise", blocking=False)
    assert sorted(told) == [0, 1, 3]
    texts = [text for text, *_ in told.values()]
    assert any(f"rank {VICTIM} has not answered for 5 s (patience)" in text for text in texts)
    assert all("on_lost='continue' would carry on" in text for text in texts)


def stop_and_return() -> tuple[float, float, int, bool]:
    """The victim stops; the others go on without it until rank 0 wakes it up."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    victim = comm.bcast(os.getpid(), root=VICTIM)
    model, missed = Vector(torch.full((100,), float(2**comm.rank))), False
    warnings.simplefilter("ignore", RuntimeWarning)
    with swarm_of(model, comm, patience=4.0, on_lost="continue") as optimizer:
        train(optimizer, model, 3)
        if comm.rank == VICTIM:
            os.kill(os.getpid(), signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while comm.rank == 0 and not missed:
            assert time.monotonic() < deadline, "the stopped node was never missed"
            train(optimizer, model, 1)
            missed = VICTIM in optimizer._peers.lost
        if comm.rank == 0:
            os.kill(victim, signal.SIGCONT)
        train(optimizer, model, 20)
        optimizer._wait_for_all()  # a first one may still leave out whom this rank has not heard again
        time.sleep(1)
        optimizer._wait_for_all()
        with optimizer.average_model():
            average = float(model.x[0])
        expected = (1 + 2 + 4 + 8) / 4 - RATE * sum(
            optimizer._mean(torch.tensor([float(optimizer.stats.steps)]))[0].tolist()
        )
    return average, expected, optimizer.stats.steps, missed


def end_by_an_error() -> str:
    from mpi4py import MPI

    comm, model = MPI.COMM_WORLD, Vector(torch.zeros(10))
    try:
        with swarm_of(model, comm) as optimizer:
            for step in range(100_000):
                train(optimizer, model, 1)
                if comm.rank == VICTIM and step == 3:
                    raise ZeroDivisionError("its own")
    except (PeerLost, ZeroDivisionError) as error:
        return str(error)
    return "not told"


@pytest.fixture(scope="module")
def on_4_ranks() -> list[Any]:
    """What the ranks tell that stop and return, and then end by an error."""
    return list(zip(*ranks(4, in_turn, [stop_and_return, end_by_an_error], timeout=280), strict=True))


def test_a_node_that_stops_and_returns_has_lost_nothing(on_4_ranks: list[Any]) -> None:
    """Late answers are still taken in, so the mean is what it would have been."""
    results = on_4_ranks[0]
    for average, expected, _, _missed in results:
        assert average == pytest.approx(expected, abs=1e-5)
    assert results[0][-1]


def test_when_a_node_ends_by_an_error_the_others_are_told_at_once(on_4_ranks: list[Any]) -> None:
    told = on_4_ranks[1]
    assert told[VICTIM] == "its own"
    for rank in (0, 1, 3):
        assert "has ended without finish()" in told[rank]


def receive_damaged() -> tuple[str, str]:
    """What a rank is told when the victim receives one flipped bit: of a swarm's message, and of a neighbour's."""
    from mpi4py import MPI

    comm, told = MPI.COMM_WORLD, ["not told", "not told"]

    def flipped(message: torch.Tensor) -> torch.Tensor:
        message.view(-1)[-1] ^= 16
        return message

    model = Vector(torch.zeros(10))
    try:
        with swarm_of(model, comm) as optimizer:
            train(optimizer, model, 5)
            if comm.rank == VICTIM:
                receive = optimizer._courier._receive
                optimizer._courier._receive = lambda source, message: receive(source, flipped(message))
            train(optimizer, model, 100_000)
    except (PeerLost, RankMismatchError) as error:
        told[0] = f"{type(error).__name__}: {error}"
    gossip: Any = DmSGD(torch.optim.SGD(model.parameters(), lr=RATE), model, comm, "complete")
    train(gossip, model, 3)
    if comm.rank == VICTIM:
        gather = gossip._neighbourhood._gather
        gossip._neighbourhood._gather = lambda *arguments: flipped(gather(*arguments))
    try:
        train(gossip, model, 100_000)
    except (RankLostError, RankMismatchError) as error:
        told[1] = f"{type(error).__name__}: {error}"
    return told[0], told[1]


def test_a_flipped_bit_is_told_by_who_received_it_and_the_others_are_told_that_it_ended() -> None:
    told = ranks(3, receive_damaged, timeout=250)
    assert told[VICTIM][0].startswith(f"RankMismatchError: rank {VICTIM}: a message of rank ")
    assert told[VICTIM][1].startswith(
        f"RankMismatchError: rank {VICTIM}: what came from rank 1 in hvd_sketch.gossip of step "
    )
    for rank in (0, 1):
        assert told[rank][0].startswith("PeerLost")
        assert "has ended without finish()" in told[rank][0]
        assert told[rank][1].startswith("RankLostError")
        assert f"for rank {VICTIM}" in told[rank][1]
