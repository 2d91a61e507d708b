"""Coordinates that are sent in turn: none of them waits for longer than the comb allows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_sketch import Compression, wire
from hvd_sketch.exchange import Exchange
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.comb import comb
from tests.support.compressors import COMPRESSED, TOTAL
from tests.support.pieces import check_pieces
from tests.support.simulation import heavy_tailed, lost, rounding, simulate


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 2**31))
def test_every_coordinate_has_its_turn_within_two_rounds(size: int, stride: int, first: int, seed: int) -> None:
    steps = torch.zeros(2 * stride - 1, size)
    for number in range(2 * stride - 1):
        steps[number, comb(size, stride, first + number, seed)] = 1
    assert steps.any(dim=0).all()
    rounds = torch.zeros(size)
    for number in range(stride):
        rounds[comb(size, stride, stride * 3 + number, seed)] += 1
    assert (rounds == 1).all()


def test_no_stride_is_no_comb() -> None:
    assert torch.arange(9)[comb(9, 0, 5, 0)].numel() == 0


def test_a_coordinate_chosen_twice_has_one_value() -> None:
    vector, chosen = torch.arange(10.0), Chosen(torch.tensor([3, 4, 7]), slice(1, 10, 3))
    assert chosen.at(vector).tolist() == [3.0, 4.0, 7.0, 1.0, 4.0, 7.0]
    chosen.put(vector, torch.tensor([30.0, 40.0, 70.0, 10.0, 41.0, 71.0]))
    assert vector.tolist() == [0.0, 10.0, 2.0, 30.0, 41.0, 5.0, 6.0, 71.0, 8.0, 9.0]
    chosen.put(vector, 0.0)
    assert vector.tolist() == [0.0, 0.0, 2.0, 0.0, 0.0, 5.0, 6.0, 0.0, 8.0, 9.0]


@given(st.integers(1, 5000), st.integers(0, 60), st.lists(st.integers(0, 5000), max_size=9), st.booleans())
def test_pieces_of_a_vector_get_their_part(size: int, stride: int, edges: list[int], clear: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    indices = (torch.rand(size, generator=generator) < 0.1).nonzero().squeeze(1)
    chosen = Chosen(indices, comb(size, stride, 3, 1))
    before = torch.randn(size, generator=generator)
    values = torch.randn(chosen.at(before).numel(), generator=generator)
    check_pieces(chosen, before, values, clear=clear, edges=edges)


def test_a_large_piece_is_cleared() -> None:
    size = (1 << 23) + 7
    chosen, vector = Chosen(torch.tensor([0, 5, size - 2]), slice(0)), torch.ones(size + 1)
    chosen.put_in_pieces({0: vector[1:]}, torch.tensor([2.0, 3.0, 4.0]), clear=True)
    assert vector.nonzero().flatten().tolist() == [0, 1, 6, size - 1]
    assert vector[[0, 1, 6, size - 1]].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_nothing_waits_for_longer_than_two_rounds_of_a_sketch() -> None:
    """Whatever its size: most gradients are nothing beside a few."""
    compressor = Compression.sketch(ratio=20.0, in_turn=0.75, half=False, warmup_steps=0, clip_norm=None)
    gradients = heavy_tailed(2, 150, TOTAL)
    gradients[:, :, :2000] *= 1e-6
    waits, longest = torch.zeros(COMPRESSED), torch.zeros(COMPRESSED)

    def note(exchange: Exchange, number: int) -> None:
        if number > 0 and exchange.comm.rank == 0:
            waits[:] = torch.where(exchange.memory.residual[:COMPRESSED] == 0.0, 0.0, waits + 1)
            torch.maximum(waits, longest, out=longest)

    runs = simulate(compressor, gradients, before_step=note)
    values = (TOTAL / 20 - (TOTAL - COMPRESSED) - 2 * wire.HEADER) * 0.8  # a fifth is table
    stride = COMPRESSED / (0.75 * values)
    assert 0.5 * stride < float(longest.max()) < 2.3 * stride
    missing = lost(gradients, runs[0].updates, [run.residual for run in runs])
    assert bool((missing <= rounding(gradients)).all())
