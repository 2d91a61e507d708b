"""Sums in few bits: nothing is lost unnoticed, all ranks get the same, as near as the code says, in so many bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.exchange.coarse import BLOCK, Coarse, Summed, sum_coarsely
from hvd_sketch.exchange.drift import Drift
from hvd_sketch.exchange.rounds import Rounds
from hvd_sketch.methods.flat import whole
from hvd_sketch.stats import Stats
from tests.support.simulation import heavy_tailed

CODES = [Coarse(4), Coarse(8), Coarse(8, floating=True)]
EVERY = pytest.mark.parametrize("code", CODES, ids=str)


def opened(rows: Tensor, name: str) -> Tensor:
    content, intact = wire.open_sealed(rows)
    assert intact.all(), name
    return content


@EVERY
@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 200), seed=st.integers(0, 1000), size=st.sampled_from([1e-30, 1.0, 1e30]))
def test_values_come_back_to_half_a_level_or_a_sixteenth(code: Coarse, count: int, seed: int, size: float) -> None:
    values = heavy_tailed(3, count, seed=seed) * size
    codes = code.encode(values)
    assert codes.shape == (3, 2 * -(-count // BLOCK) + -(-count * code.bits // 8))
    padded = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(3, -1, BLOCK)
    largest = padded.abs().amax(2).repeat_interleave(BLOCK, dim=1)[:, :count]
    bound = (0.0665 * values.abs()).maximum(largest * 2.0**-18) if code.floating else 0.504 * largest / code.largest
    assert ((code.decode(codes, count) - values).abs() <= bound).all()


@EVERY
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_what_was_sent_is_the_total_and_what_was_lost(code: Coarse, size: int) -> None:
    values = heavy_tailed(size, 300)

    def on_rank(comm: Communicator) -> tuple[Summed, int]:
        summed = sum_coarsely(values[comm.rank], code, comm, "test", opened)
        return summed, comm.bytes_sent

    seen, sent = zip(*run_in_process(size, on_rank), strict=True)
    assert all(torch.equal(each.total, seen[0].total) for each in seen)
    accounted = seen[0].total.double() + torch.stack([each.lost for each in seen]).double().sum(0)
    contributed = torch.stack([each.sent for each in seen]).double().sum(0)
    torch.testing.assert_close(accounted, contributed, rtol=1e-6, atol=1e-6 * float(values.abs().max()))
    share = {1: 320, 2: 160, 5: 64, 40: 8}[size]
    assert set(sent) == {2 * (size - 1) * (2 * -(-share // BLOCK) + share * code.bits // 8 + wire.SEAL)}


@EVERY
def test_what_is_not_finite_stays_so(code: Coarse) -> None:
    for bad in (torch.inf, torch.nan):
        values = torch.ones(2, 64)
        values[1, 40] = bad

        def on_rank(comm: Communicator, values: Tensor = values) -> Tensor:
            return sum_coarsely(values[comm.rank], code, comm, "test", opened).total

        for total in run_in_process(2, on_rank):
            assert not total[32:].isfinite().all()
            torch.testing.assert_close(total[:32], torch.full((32,), 2.0), rtol=0.01, atol=0.0)


def test_side_messages_take_a_quarter_of_the_bytes_and_travel_whole_where_a_rank_has_left() -> None:
    values = heavy_tailed(4, 990)

    def on_rank(comm: Communicator, *, all_present: bool) -> tuple[Tensor, int]:
        stats, mine = Stats(), values[comm.rank].clone()
        rounds = Rounds(comm, stats, Drift(whole([("values", torch.zeros(990))])))
        rounds.all_present = all_present
        rounds.sum_coarsely(mine, "test")
        return mine, stats.bytes_sent

    exact, exact_bytes = run_in_process(4, lambda comm: on_rank(comm, all_present=False))[0]
    coarse, coarse_bytes = run_in_process(4, lambda comm: on_rank(comm, all_present=True))[0]
    torch.testing.assert_close(exact, values.sum(0), rtol=1e-6, atol=1e-6 * float(values.abs().max()))
    assert not torch.equal(coarse, exact)
    assert (coarse - exact).norm() < 0.1 * exact.norm()
    assert coarse_bytes < 0.28 * exact_bytes
