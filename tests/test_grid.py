"""Integers on a shared grid: their sums are exact in whatever order, and what is sent is told to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch import grid
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup, run_in_process
from hvd_sketch.grid import BLOCK, Grid
from tests.support.simulation import heavy_tailed


@settings(max_examples=40)
@given(ranks=st.integers(1, 128), seed=st.integers(0, 1000), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
def test_halves_sum_to_what_was_sent_in_any_order(ranks: int, seed: int, size: float) -> None:
    values = heavy_tailed(ranks, 30, seed=seed) * size
    scales = grid.scales_of(values.mean(0).abs(), ranks)
    lanes = torch.empty(ranks, 30, dtype=torch.float16)
    places = InProcessGroup(ranks).communicators
    sent = torch.stack([grid.put(lanes[place.rank], values[place.rank], scales, place) for place in places])
    order = torch.randperm(ranks, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(30, dtype=torch.float16)
    for rank in order.tolist():
        total += lanes[rank]
    halves = lanes[: ranks // 2].sum(0, dtype=torch.float16) + lanes[ranks // 2 :].sum(0, dtype=torch.float16)
    assert torch.equal(total, halves)
    assert torch.equal(grid.take(total, scales).double(), sent.double().sum(0))


@pytest.mark.parametrize("ranks", [1, 2, 8, 100])
def test_an_equal_value_on_all_ranks_loses_at_most_one_level_in_all(ranks: int) -> None:
    """However few levels it has: a thousand values, from none to three of them."""
    values, scale = torch.linspace(0.0, 3.0, 1000), torch.ones(1000)
    total = torch.zeros(1000)
    for place in InProcessGroup(ranks).communicators:
        total += grid.put(torch.empty(1000, dtype=torch.float16), values, scale, place)
    assert (total - ranks * values).abs().max() <= 1.0 + 1e-4 * ranks


def test_zeros_are_sent_as_zeros() -> None:
    for place in InProcessGroup(7).communicators:
        assert not grid.put(torch.empty(9, dtype=torch.float16), torch.zeros(9), torch.ones(9), place).any()


@given(ranks=st.integers(1, 128), size=st.floats(1e-25, 1e25))
def test_a_value_of_the_expected_size_has_a_quarter_of_the_levels(ranks: int, size: float) -> None:
    largest = float(torch.tensor([size])) * float(grid.scales_of(torch.tensor([size]), ranks))
    levels = 2 ** ((2048 // ranks).bit_length() - 1)
    assert levels / 8 <= largest < levels / 4


def test_ranks_that_are_too_many_send_float32() -> None:
    assert grid.serves(128, torch.float16)
    assert not grid.serves(129, torch.float16)
    assert not grid.serves(2, torch.float32)
    assert grid.itemsize(129, torch.float16) == 4
    assert grid.lanes(1000, 129, torch.float16) == 1000


def sums_of(values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What every rank sent and read in each step, of values of shape (ranks, steps, entries)."""

    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        shared, sent, read = Grid(values.shape[2], torch.float16), [], []
        for mine in values[comm.rank]:
            message = torch.empty(shared.lanes(comm.size), dtype=shared.dtype(comm.size))
            sent.append(shared.put(message, mine, comm))
            comm.allreduce(message, "values")
            read.append(shared.take(message, mine.numel(), comm, learn=True))
        return torch.stack(sent), torch.stack(read)

    return run_in_process(len(values), body)


def test_what_ranks_send_is_what_all_read() -> None:
    values = heavy_tailed(3, 6, 500)
    runs = sums_of(values)
    sent = torch.stack([run[0] for run in runs]).double()
    for _, read in runs:
        assert torch.equal(read[1:].double(), sent[:, 1:].sum(0))
        torch.testing.assert_close(read[0], values[:, 0].sum(0))
    assert torch.equal(sent[:, 0].float(), values[:, 0])


def test_every_block_has_the_resolution_of_its_own_values() -> None:
    sizes = torch.tensor([1e-9, 1.0, 1e9]).repeat_interleave(BLOCK)
    values = torch.randn(2, 4, 3 * BLOCK, generator=torch.Generator().manual_seed(0)) * sizes
    off = (sums_of(values)[0][1][-1] - values[:, -1].sum(0)) / sizes
    assert off.abs().max() < 0.1


def test_a_block_that_had_nothing_for_long_is_followed_at_once() -> None:
    values = torch.ones(2, 30, 2 * BLOCK)
    values[:, :20, BLOCK:] = 0.0
    values[:, 20:, BLOCK:] *= 1e-6
    read = sums_of(values)[0][1]
    torch.testing.assert_close(read[22:, BLOCK:], values[:, 22:, BLOCK:].sum(0), rtol=0.05, atol=0.0)


def test_another_number_of_values_keeps_the_scales() -> None:
    shared = Grid(4 * BLOCK, torch.float16)
    shared.scales = torch.tensor([1.0, 2.0, 4.0, 8.0])
    shared.resize(2 * BLOCK - 5)
    assert shared.scales.tolist() == [1.0, 4.0]
    shared.resize(8 * BLOCK)
    assert shared.scales.tolist() == [1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0]
