"""The sketch's definition: linearity, unbiasedness, variance, collisions, choice, dtypes, sizes and refusals."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.sketch import CountSketch, Geometry
from hvd_sketch.sketch.geometry import TILE_WIDTH, cells_and_signs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROW = (300, 20)
"""dim and cols of a sketch of one tile."""
WIDE = (30_000, 2 * TILE_WIDTH + 5)
"""dim and cols of a sketch of two tiles and some blocks."""


def sketch_of(vector: Tensor, rows: int, cols: int, seed: int = 0) -> CountSketch:
    """The sketch of one vector."""
    sketch = CountSketch(vector.numel(), rows, cols, seed)
    sketch.add(vector)
    return sketch


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that are the same in each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(count: int, seed: int) -> Tensor:
    """Integers small enough that float32 sums of them are exact."""
    return torch.randint(-1000, 1000, (count,), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("dim", "cols"), [NARROW, WIDE])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_sketch_of_a_sum_is_the_sum_of_the_sketches(dim: int, cols: int, rows: int) -> None:
    one, two = integers(dim, 1), integers(dim, 2)
    total = sketch_of(one + 3 * two, rows, cols).table
    assert torch.equal(total, sketch_of(one, rows, cols).table + 3 * sketch_of(two, rows, cols).table)
    both = sketch_of(one, rows, cols)
    both.add(two, scale=3.0)
    assert torch.equal(total, both.table)


@pytest.mark.parametrize(("dim", "cols", "seeds"), [(*NARROW, 4000), (*WIDE, 400)])
def test_a_row_is_unbiased_with_the_variance_of_those_it_may_meet(dim: int, cols: int, seeds: int) -> None:
    """Coordinate i meets each one outside its own block with probability 1/cols and a random sign."""
    vector = randn(dim) * torch.linspace(0.1, 2.0, dim)
    mean, square = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    for seed in range(seeds):
        error = (sketch_of(vector, 1, cols, seed).estimate() - vector).double()
        mean += error / seeds
        square += error.square() / seeds
    block = Geometry(dim, 1, cols).block
    energy = vector.double().square()
    blocks = torch.arange(dim) // block
    expected = (energy.sum() - torch.zeros(int(blocks[-1]) + 1).double().index_add(0, blocks, energy)[blocks]) / cols
    assert (expected <= energy.sum() / cols).all()
    assert (mean.abs() <= 6 * (expected / seeds).sqrt()).all()
    assert float(square.mean() / expected.mean()) == pytest.approx(1, abs=0.05)
    assert float((square / expected).max()) < 1 + 20 / math.sqrt(seeds)


@pytest.mark.parametrize(("dim", "cols", "seeds"), [(*NARROW, 40), (*WIDE, 100)])
def test_pairs_of_different_blocks_collide_once_in_cols(dim: int, cols: int, seeds: int) -> None:
    geometry = Geometry(dim, 2, cols)
    some = torch.randint(dim, (400,), generator=torch.Generator().manual_seed(3)).unique()
    apart = (some // geometry.block)[:, None] != (some // geometry.block)[None]
    same = ~apart & ~torch.eye(some.numel(), dtype=torch.bool)
    collisions = torch.zeros(2, dtype=torch.float64)
    agreements = 0.0
    for seed in range(seeds):
        cell, sign = cells_and_signs(geometry, seed, some)
        equal = cell[:, :, None] == cell[:, None]
        assert not (equal & same).any()
        collisions += (equal & apart).sum(dim=(1, 2))
        agreements += float((sign[0].outer(sign[0]) * (equal[0] & apart)).sum())
    pairs = int(apart.sum()) * seeds
    # Both orders of a pair are counted, so the count varies as twice that of its half.
    deviation = math.sqrt(2 * pairs / cols)
    assert (collisions - pairs / cols).abs().max() < 6 * deviation
    assert abs(agreements) < 6 * deviation


def test_rows_meet_different_pairs() -> None:
    """With one shared row of offsets, all rows would fail together."""
    cell, sign = cells_and_signs(Geometry(10_000, 5, 100), 7, torch.arange(10_000))
    for one in range(5):
        for two in range(one):
            assert float((cell[one] == cell[two]).double().mean()) < 0.1
            assert abs(float((sign[one] * sign[two]).mean())) < 0.06


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 33])
@pytest.mark.filterwarnings("ignore:CountSketch")
def test_a_vector_of_one_block_comes_back_exactly(rows: int) -> None:
    for cols in (200, 9000):
        vector = randn(Geometry(9000, rows, cols).block)
        assert torch.equal(sketch_of(vector, rows, cols).estimate(), vector)


def test_estimates_of_an_index_are_those_of_all() -> None:
    sketch = sketch_of(randn(WIDE[0]), 3, WIDE[1])
    index = torch.tensor([5, 0, WIDE[0] - 1, 5])
    assert torch.equal(sketch.estimate(index), sketch.estimate()[index])


def test_top_k_finds_the_large_ones() -> None:
    vector = randn(100_000)
    large = torch.randperm(100_000, generator=torch.Generator().manual_seed(1))[:50].sort().values
    vector[large] += 100 * vector[large].sign()
    indices, estimates = sketch_of(vector, 5, 5000).top_k(50)
    assert torch.equal(indices, large)
    assert (estimates - vector[large]).abs().max() < 30


@given(st.data())
@settings(max_examples=40)
def test_top_k_is_the_stable_choice_among_all_estimates(data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, 3000))
    sketch = CountSketch(
        dim, data.draw(st.sampled_from([1, 3])), data.draw(st.integers(1, 5000)), data.draw(st.integers())
    )
    # Few distinct values, so that there are ties.
    sketch.add(torch.tensor([0.0, -1.0, 1.0, 2.0])[integers(dim, 1).long() % 4])
    k = data.draw(st.integers(1, dim))
    indices, estimates = sketch.top_k(k)
    everything = sketch.estimate().tolist()
    expected = sorted(sorted(range(dim), key=lambda i: (-abs(everything[i]), i))[:k])
    assert indices.tolist() == expected
    assert estimates.tolist() == [everything[i] for i in expected]


def test_ties_go_to_the_smaller_index() -> None:
    empty = CountSketch(200_000, 3, 10_000)
    assert torch.equal(empty.top_k(1000)[0], torch.arange(1000))
    level = sketch_of(torch.ones(Geometry(1, 3, 400_000).block), 3, 400_000)
    assert torch.equal(level.top_k(1000)[0], torch.arange(1000))


@given(st.lists(st.integers(0, WIDE[0]), max_size=6), st.sampled_from(DTYPES), st.sampled_from([1.0, -0.3]))
@settings(max_examples=30)
def test_slices_equal_the_whole(cuts: list[int], dtype: torch.dtype, scale: float) -> None:
    dim, cols = WIDE
    vector = randn(dim).to(dtype)
    whole, each, many = (CountSketch(dim, 3, cols, 11) for _ in range(3))
    whole.add(vector, scale=scale)
    edges = [0, *sorted(cuts), dim]
    slices = [vector[start:stop] for start, stop in pairwise(edges)]
    for start, part in zip(edges[:-1], slices, strict=True):
        each.add(part, start, scale)
    many.add_many(slices, edges[:-1], scale)
    assert torch.equal(each.table, whole.table)
    assert torch.equal(many.table, whole.table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_sketched_as_its_float32_values(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    vector = every[every.isfinite()]
    half, single = (CountSketch(vector.numel(), 3, 1000) for _ in range(2))
    half.add(vector)
    single.add(vector.float())
    assert torch.equal(half.table, single.table)


@pytest.mark.parametrize("start", [2**31 - 700, 2**33 + 12_345])
def test_dimensions_above_32_bits(start: int) -> None:
    vector = integers(1400, 5)
    sketch = CountSketch(start + 1400, 3, 15 * TILE_WIDTH, seed=9)
    sketch.add(vector, start)
    index = torch.arange(start, start + 1400)
    assert len((index // sketch.geometry.block).unique()) == 1
    assert torch.equal(sketch.estimate(index), vector)
    cell, sign = cells_and_signs(sketch.geometry, 9, index)
    assert int(cell.max()) < 15 * TILE_WIDTH
    assert torch.equal(sketch.table.gather(1, cell) * sign, vector.expand(3, -1))


def test_different_seeds_draw_differently_and_reset_starts_over() -> None:
    vector = randn(1000)
    one, other = sketch_of(vector, 3, 100, seed=1), sketch_of(vector, 3, 100, seed=2)
    assert not torch.equal(one.table, other.table)
    one.reset(2)
    assert not one.table.any()
    one.add(vector)
    assert torch.equal(one.table, other.table)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_l2_norm_is_within_its_error(rows: int) -> None:
    vector, cols = randn(50_000), 1000
    norm = float(vector.norm())
    for seed in range(20):
        # The energy of a row has a relative variance of at most 2 / cols.
        assert float(sketch_of(vector, rows, cols, seed).l2_norm()) == pytest.approx(norm, rel=4 / math.sqrt(2 * cols))


def test_even_rows_warn_once_and_work() -> None:
    with pytest.warns(UserWarning, match="rows=4 is even") as warned:
        sketch = sketch_of(integers(100, 1), 4, 100)
    assert len(warned) == 1
    assert torch.equal(sketch.estimate(), integers(100, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CountSketch(100, 3, 10)


def test_a_table_may_be_given() -> None:
    table = torch.ones(3, 50)
    sketch = CountSketch(100, 3, 50, table=table)
    sketch.reset(0)
    assert sketch.table is table
    assert not table.any()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dim", (0, 3, 10)),
        ("rows", (10, 0, 10)),
        ("cols", (10, 3, -1)),
        ("cols", (10, 3, 1.5)),
        ("cols", (10, 3, 2**31)),
    ],
)
def test_sizes_are_refused_by_name(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        CountSketch(*arguments)


@pytest.mark.parametrize("table", [torch.zeros(3, 9), torch.zeros(10, 3).t(), torch.zeros(3, 10, dtype=torch.float64)])
def test_tables_that_do_not_fit_are_refused(table: Tensor) -> None:
    with pytest.raises(ValueError, match="table must be"):
        CountSketch(100, 3, 10, table=table)


@pytest.mark.parametrize(
    ("vector", "offset", "message"),
    [
        (torch.zeros(5, dtype=torch.float64), 0, "dtype"),
        (torch.zeros(5, dtype=torch.int64), 0, "dtype"),
        (torch.zeros(5, dtype=torch.complex64), 0, "dtype"),
        (torch.zeros(5), 96, "96 to 101 do not fit"),
        (torch.zeros(5), -1, "do not fit"),
        (torch.zeros(5, device="meta"), 0, "meta"),
        (torch.zeros(10)[::2], 0, "contiguous"),
    ],
)
def test_vectors_that_cannot_be_added_are_refused(vector: Tensor, offset: int, message: str) -> None:
    sketch = CountSketch(100, 3, 10)
    with pytest.raises(ValueError, match=message):
        sketch.add(vector, offset)
    with pytest.raises(ValueError, match=message):
        sketch.add_many([vector], [offset])
    assert not sketch.table.any()


def test_slices_out_of_order_are_refused() -> None:
    sketch = CountSketch(100, 3, 10)
    with pytest.raises(ValueError, match="offset 4 lies before 5"):
        sketch.add_many([torch.ones(5), torch.ones(5)], [0, 4])
    assert not sketch.table.any()
    sketch.add_many([], [])
    sketch.add(torch.ones(0), 100)
    assert not sketch.table.any()


@pytest.mark.parametrize("k", [0, 101, -1])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k must be in 1 … dim=100"):
        CountSketch(100, 3, 10).top_k(k)
