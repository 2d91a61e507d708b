"""Ranks with fewer steps than others: they count as gradient zero, and nothing of anybody's is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, RankMismatchError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange.joining import stand_in
from tests.support.compressors import EVERY, PLAIN, TOTAL
from tests.support.simulation import heavy_tailed, lost, make, rounding, step

SIZE, EPOCHS = 3, 2


def steps_of(rank: int, epoch: int) -> range:
    """Rank 1 goes on for longest; rank 2 has nothing in the first epoch."""
    return range(10 * epoch, 10 * epoch + (3, 5 + epoch, 3 * epoch)[rank])


@EVERY
def test_what_is_sent_and_what_is_kept_is_what_was_computed(compressor: Compressor) -> None:
    gradients = heavy_tailed(SIZE, 20, TOTAL)

    def body(comm: Communicator) -> tuple[list[int], list[Tensor], Tensor, int]:
        exchange = make(compressor, comm)
        updates, lasts = [], []
        for epoch in range(EPOCHS):
            updates += [step(exchange, gradients[comm.rank, number]) for number in steps_of(comm.rank, epoch)]
            lasts.append(stand_in([exchange], comm))
        updates.append(step(exchange, gradients[comm.rank, 19]))
        return lasts, updates, exchange.memory.residual, exchange.step

    runs = run_in_process(SIZE, body)
    computed = torch.zeros_like(gradients)
    for rank in range(SIZE):
        for number in (*steps_of(rank, 0), *steps_of(rank, 1), 19):
            computed[rank, number] = gradients[rank, number]
    assert all(lasts == [1, 1] and taken == 3 + 1 for lasts, _, _, taken in runs)
    assert all(torch.equal(updates[-1], runs[0][1][-1]) for _, updates, _, _ in runs)
    longest = torch.stack(runs[1][1])
    missing = lost(computed, longest, [residual for _, _, residual, _ in runs])
    assert bool((missing <= rounding(computed)).all())


def test_two_exchanges_in_turn_and_a_tie() -> None:
    """As of two optimizers; all join at the same time in the end, and the highest rank counts as the last."""
    gradients = heavy_tailed(2, 6, TOTAL)

    def body(comm: Communicator) -> int:
        exchanges = [make(Compression.sharded(ratio=10.0, **PLAIN), comm) for _ in range(2)]
        for number in range(4 - 2 * comm.rank):
            for exchange in exchanges:
                step(exchange, gradients[comm.rank, number])
        first = stand_in(exchanges, comm)
        return 10 * first + stand_in(exchanges, comm)

    assert run_in_process(2, body) == [1, 1]


def test_a_single_process_is_the_last() -> None:
    assert stand_in([make(Compression.topk(ratio=10.0, **PLAIN), SingleProcess())], SingleProcess()) == 0


def test_ranks_that_go_on_still_hear_of_each_others_problems() -> None:
    gradients = heavy_tailed(3, 2, TOTAL)

    def body(comm: Communicator) -> str:
        exchange = make(Compression.sharded(ratio=10.0, **PLAIN), comm)
        step(exchange, gradients[comm.rank, 0])
        if comm.rank == 2:
            exchange.fail_together("it has one")
        with pytest.raises(ValueError, match="rank 2: it has one") as told:
            stand_in([exchange], comm) if comm.rank == 0 else step(exchange, gradients[comm.rank, 1])
        return str(told.value)

    assert len(set(run_in_process(3, body))) == 1


def test_ranks_that_drift_while_one_has_joined_are_told_by_their_own_numbers() -> None:
    gradients = heavy_tailed(3, 2, TOTAL)

    def body(comm: Communicator) -> str:
        exchange = make(Compression.sharded(ratio=10.0, **PLAIN), comm)
        contents = exchange._update.contents
        if comm.rank == 2:
            exchange._update.contents = lambda: [content + 1 for content in contents()]  # type: ignore[method-assign]
        step(exchange, gradients[comm.rank, 0])
        with pytest.raises(RankMismatchError) as told:
            stand_in([exchange], comm) if comm.rank == 0 else step(exchange, gradients[comm.rank, 1])
        return str(told.value)

    (text,) = set(run_in_process(3, body))
    assert "update of step 0: rank 1 has" in text
    assert ", rank 2 has" in text
    assert "rank 0 has" not in text
