"""Laws that every method keeps, on simulated ranks: one model, resuming, equality with dense training, bad input."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, RankLostError, RankMismatchError
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup, run_in_process
from hvd_sketch.methods.exchanging import ExchangingOptimizer
from tests.support.methods import EVERY, EXACT, METHODS, Method, exchanging, fresh, shared, train
from tests.support.training import flat

SIZE, STEPS, SAVED_AFTER = 3, 13, 7
EXCHANGED = ("exchange", "anticipate", "step ahead")
EXCHANGING = [method.make for name, method in METHODS.items() if name.startswith(EXCHANGED)]


@EVERY
def test_all_ranks_train_one_model(method: Method) -> None:
    def body(comm: Communicator) -> Tensor:
        model, optimizer = fresh(method, comm)
        train(optimizer, model, comm.rank, range(STEPS))
        return shared(optimizer, model)

    first, *others = run_in_process(SIZE, body)
    assert first.isfinite().all()
    assert all(torch.equal(first, other) for other in others)


@EVERY
def test_a_saved_run_continues_as_if_never_saved(method: Method) -> None:
    if method in (METHODS["dmsgd"], METHODS["decentlam"], METHODS["lead"]):
        pytest.skip("a gossip method's checkpoint is each rank's model and optimizer")

    def body(comm: Communicator) -> bool:
        model, optimizer = fresh(method, comm)
        train(optimizer, model, comm.rank, range(SAVED_AFTER))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved = stored({**copy.deepcopy(state), "memory": optimizer.memory_state_dict()})
        train(optimizer, model, comm.rank, range(SAVED_AFTER, STEPS))
        other, resumed = fresh(method, comm)
        other.load_state_dict(saved["model"])
        if isinstance(resumed, ExchangingOptimizer) and comm.rank == 0:  # its memory may come first
            resumed.load_memory_state_dict(saved["memory"])
            resumed.load_state_dict(saved["optimizer"])
        else:
            resumed.load_state_dict(saved["optimizer"])
            resumed.load_memory_state_dict(saved["memory"])
        train(resumed, other, comm.rank, range(SAVED_AFTER, STEPS))
        return torch.equal(flat(model), flat(other))

    assert all(run_in_process(SIZE, body))


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_sending_everything_is_dense_training(method: Method) -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        model, optimizer = fresh(method, comm, dense=True)
        train(optimizer, model, comm.rank, range(STEPS))
        dense, plain = fresh(method._replace(make=exchanging(Compression.none)), comm)
        train(plain, dense, comm.rank, range(STEPS))
        return shared(optimizer, model), flat(dense)

    for ours, dense in run_in_process(SIZE, body):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)


@EVERY
def test_a_bad_gradient_on_one_rank_spoils_no_model(method: Method) -> None:
    def body(comm: Communicator) -> tuple[Tensor, int]:
        model, optimizer = fresh(method, comm)
        train(optimizer, model, comm.rank, range(STEPS), lambda step: step == 4 and comm.rank == 1)
        return shared(optimizer, model), skipped(optimizer)

    seen = run_in_process(SIZE, body)
    assert all(model.isfinite().all() for model, _ in seen)
    assert sum(count for _, count in seen) >= 1


def check_told_alike(method: Method, other: Method) -> None:
    """Where rank 1 uses the other one."""

    def body(comm: Communicator) -> str:
        try:
            model, optimizer = fresh(other if comm.rank == 1 else method, comm)
            train(optimizer, model, comm.rank, range(1))
        except RankMismatchError as error:
            return str(error)
        return "no error"

    told = run_in_process(SIZE, body)
    assert len(set(told)) == 1
    assert "rank 1 has" in told[0]


@EVERY
def test_ranks_of_different_settings_are_told_alike(method: Method) -> None:
    """Rank 1 uses another method of the same kind."""
    other = METHODS["local sgd" if method is not METHODS["local sgd"] else "overlap"]
    if method.make in EXCHANGING:
        other = method._replace(make=exchanging(Compression.sharded(ratio=9.0)))

    check_told_alike(method, other)


@EVERY
def test_a_rank_that_ends_is_told_to_all_others(method: Method) -> None:
    """Nobody waits for ever for it; the limit is only that of this test."""
    told = [""] * SIZE

    def body(comm: Communicator) -> None:
        model, optimizer = fresh(method, comm)
        try:
            for step in range(8):
                if comm.rank == 1 and step == 4:
                    raise ValueError("this rank cannot go on")
                train(optimizer, model, comm.rank, range(step, step + 1))
            getattr(optimizer, "finish", lambda: None)()
        except RankLostError as error:
            told[comm.rank] = str(error)

    with pytest.raises(ValueError, match="cannot go on"):
        InProcessGroup(SIZE, timeout=60).run(body)
    assert all("rank 1, which ended by ValueError" in told[rank] for rank in range(SIZE) if rank != 1), told


@pytest.mark.parametrize("other", ["local sgd", "dmsgd", "step ahead"])
def test_ranks_of_different_methods_are_told_alike(other: str) -> None:
    """Whether they compare when they are made or in the first step."""
    check_told_alike(METHODS["exchange"], METHODS[other])


def stored(state: dict[str, Any]) -> Any:
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def skipped(optimizer: Any) -> int:
    """The steps, or meetings, that were left out on this rank."""
    stats = optimizer.stats if hasattr(optimizer, "stats") else optimizer.exchange.stats
    return int(stats.skipped)
