"""The native kernel equals the reference to the last bit: shapes, dtypes, threads, instruction sets, offsets, k."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hvd_sketch.native
from hvd_sketch.sketch import CountSketch, Geometry, native, reference
from hvd_sketch.sketch.geometry import TILE_WIDTH
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.comb import comb
from tests.support.without_kernel import without_kernel

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LANES = (4, 8, 16)
BIG = 140_000
"""Coordinates enough for the kernel to call other threads."""

seeds = st.integers(-(2**70), 2**70)
scales = st.sampled_from([1.0, -1.0, 0.3, 1e-30, 0.0])
columns = st.one_of(
    st.integers(1, 80),
    st.integers(1, 3 * TILE_WIDTH),
    st.sampled_from([TILE_WIDTH, 2 * TILE_WIDTH - 1, 2 * TILE_WIDTH]),
)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """One thread and the widest instruction set, unless a test says otherwise."""
    yield
    native.limit_lanes(max(LANES))
    torch.set_num_threads(1)


def bits(values: Tensor) -> Tensor:
    """What tells 0.0 from -0.0."""
    return values.contiguous().view(torch.int32)


def numbers(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes, some of them subnormal, 0.0 or -0.0, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    kind = torch.randint(6, (count,), generator=generator)
    values = torch.where(kind == 0, values * 0.0, values)
    values = torch.where(kind == 1, values.round(), values)
    values = torch.where(
        kind == 2, values * 10.0 ** (8 * torch.randn(count, generator=generator)).clamp(-44, 37), values
    )
    if dtype == torch.float16:
        values = values.clamp(-60_000, 60_000)
    return values.to(dtype)


def check_add(geometry: Geometry, seed: int, vector: Tensor, offset: int, scale: float) -> Tensor:
    """Add to a table that is not empty; returns the table."""
    ours = numbers(geometry.rows * geometry.cols, seed=5).view(geometry.rows, geometry.cols)
    theirs = ours.clone()
    native.add(geometry, seed, ours, vector, offset, scale)
    reference.add(geometry, seed, theirs, vector, offset, scale)
    assert torch.equal(bits(ours), bits(theirs))
    return ours


def check_estimates(
    geometry: Geometry, seed: int, table: Tensor, *choices: int, threads: Sequence[int] = (1,)
) -> None:
    """Estimate everything and choose each number of coordinates, with each number of threads."""
    everything = reference.estimate(geometry, seed, table, torch.arange(geometry.dim))
    order = torch.sort(everything.abs(), descending=True, stable=True).indices
    assert torch.equal(order[: choices[0]].sort().values, reference.top_k(geometry, seed, table, choices[0])[0])
    for count in threads:
        torch.set_num_threads(count)
        assert torch.equal(bits(native.estimate_all(geometry, seed, table)), bits(everything))
        for k in choices:
            chosen = order[:k].sort().values
            indices, estimates = native.top_k(geometry, seed, table, k)
            assert torch.equal(indices, chosen)
            assert torch.equal(bits(estimates), bits(everything[chosen]))


def test_the_kernel_is_built() -> None:
    assert native.available()


@given(st.data(), st.sampled_from(ROWS), columns, seeds)
@settings(max_examples=120)
def test_any_shape(data: st.DataObject, rows: int, cols: int, seed: int) -> None:
    dim = data.draw(st.integers(1, min(12_000, 100 * cols)))
    start = data.draw(st.integers(0, dim - 1))
    vector = numbers(data.draw(st.integers(0, dim - start)), data.draw(st.sampled_from(DTYPES)))
    geometry = Geometry(dim, rows, cols)
    native.limit_lanes(data.draw(st.sampled_from(LANES)))
    table = check_add(geometry, seed, vector, start, data.draw(scales))
    check_estimates(geometry, seed, table, data.draw(st.integers(1, dim)), 1)


@pytest.mark.parametrize("rows", [*ROWS[:6], *(pytest.param(rows, marks=pytest.mark.slow) for rows in ROWS[6:])])
def test_any_number_of_threads_and_any_instruction_set(rows: int) -> None:
    geometry, vector = Geometry(BIG, rows, 9001), numbers(BIG - 777, DTYPES[rows % len(DTYPES)])
    expected = torch.zeros(rows, geometry.cols)
    reference.add(geometry, rows, expected, vector, 333, 0.7)
    for lanes in LANES:
        native.limit_lanes(lanes)
        tables, counts = [], (1, 2, 3) if lanes == max(LANES) else (2,)
        for threads in counts:
            torch.set_num_threads(threads)
            tables.append(torch.zeros(rows, geometry.cols))
            native.add(geometry, rows, tables[-1], vector, 333, 0.7)
        assert all(torch.equal(bits(table), bits(expected)) for table in tables)
        check_estimates(geometry, rows, expected, 1, BIG // 1000, BIG // 100, BIG // 2, threads=counts)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_coordinate_may_be_chosen(threads: int) -> None:
    torch.set_num_threads(threads)
    geometry = Geometry(BIG, 3, 20_000)
    check_estimates(geometry, 1, check_add(geometry, 1, numbers(BIG), 0, 1.0), BIG, BIG - 1)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_ties_and_a_table_of_zeros(rows: int) -> None:
    """More ties than a thread has room for, at the threshold and at zero."""
    for cols in (9001, 210_000):
        geometry = Geometry(BIG, rows, cols)
        table = torch.zeros(rows, cols)
        check_estimates(geometry, 1, table, 5, BIG // 2)
        native.add(geometry, 1, table, (numbers(BIG) > 0.5).float(), 0, 1.0)
        check_estimates(geometry, 1, table, 5, BIG // 100, BIG // 2)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_vector_that_misleads_the_sample(rows: int) -> None:
    """All that is large lies together, where a sample may see none of it, or little else."""
    geometry = Geometry(BIG, rows, 9001)
    vector = 1e-3 * numbers(BIG).clamp(-3, 3)
    vector[70_000:72_000] += 100
    table = check_add(geometry, 3, vector, 0, 1.0)
    check_estimates(geometry, 3, table, 1, 500, 2000, 2500, 20_000)


def test_infinities_are_chosen_first() -> None:
    geometry = Geometry(5000, 3, 6000)
    vector = numbers(5000)
    vector[[7, 4000]] = torch.tensor([float("inf"), float("-inf")])
    table = check_add(geometry, 1, vector, 0, 1.0)
    check_estimates(geometry, 1, table, 2, 10)
    assert native.top_k(geometry, 1, table, 2)[0].tolist() == [7, 4000]


@pytest.mark.parametrize("rows", [1, 3])
def test_offsets_beyond_32_bits(rows: int) -> None:
    start = 2**33 + 4321
    geometry = Geometry(start + 30_000, rows, 9001)
    table = check_add(geometry, 5, numbers(30_000), start, 1.0)
    assert table.any()


def test_choosing_among_more_coordinates_than_32_bits_count() -> None:
    """And than memory would hold the estimates of."""
    start = 2**33 + 4321
    sketch = CountSketch(start + 5, 7, 300_000, seed=5)
    vector = 1000.0 + torch.arange(5)
    sketch.add(vector, start)
    indices, estimates = sketch.top_k(5)
    assert torch.equal(indices, torch.arange(start, start + 5))
    assert torch.equal(estimates, vector)


@given(st.lists(st.integers(0, 30_000), max_size=9), seeds, scales)
@settings(max_examples=30)
def test_many_slices_of_different_dtypes(edges: list[int], seed: int, scale: float) -> None:
    geometry = Geometry(30_000, 3, 2 * TILE_WIDTH + 3)
    edges.sort()
    offsets, stops = edges[:-1:2], edges[1::2]
    slices = [
        numbers(stop - start, DTYPES[i % 3], seed=i)
        for i, (start, stop) in enumerate(zip(offsets, stops, strict=True))
    ]
    ours, theirs = torch.zeros(3, geometry.cols), torch.zeros(3, geometry.cols)
    native.add_many(geometry, seed, ours, slices, offsets, scale)
    for part, offset in zip(slices, offsets, strict=True):
        reference.add(geometry, seed, theirs, part, offset, scale)
    assert torch.equal(bits(ours), bits(theirs))


def check_add_advanced(geometry: Geometry, seed: int, scale: float, kept: Chosen) -> tuple[Tensor, Tensor]:
    """With and without the kernel: the vector and the table."""
    given, change = numbers(geometry.dim), numbers(geometry.dim, seed=1)
    values = numbers(kept.at(given).numel(), seed=2)
    both = []
    for kernel in (nullcontext, without_kernel):
        sketch, vector = CountSketch(geometry.dim, geometry.rows, geometry.cols, seed), given.clone()
        with kernel():
            sketch.add_advanced(vector, change, scale, kept, values)
        both.append((vector, sketch.table))
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(bits(ours), bits(theirs))
    return both[0]


@given(st.data(), st.sampled_from((1, 3, 5)), columns, st.integers(0, 2**31), scales)
@settings(max_examples=60)
def test_a_vector_is_changed_on_its_way_into_the_table(
    data: st.DataObject, rows: int, cols: int, seed: int, scale: float
) -> None:
    geometry = Geometry(data.draw(st.integers(1, min(12_000, 100 * cols))), rows, cols)
    native.limit_lanes(data.draw(st.sampled_from(LANES)))
    share = data.draw(st.sampled_from([0.0, 0.01, 1.0]))
    indices = (torch.rand(geometry.dim, generator=torch.Generator().manual_seed(seed)) < share).nonzero().squeeze(1)
    check_add_advanced(geometry, seed, scale, Chosen(indices, comb(geometry.dim, data.draw(st.integers(0, 50)), 0, 0)))


def test_a_vector_is_changed_alike_by_any_number_of_threads() -> None:
    geometry, kept = Geometry(BIG, 3, 9001), Chosen(torch.arange(0, BIG, 57), comb(BIG, 33, 1, 0))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(check_add_advanced(geometry, 1, 0.3, kept))
    assert all(torch.equal(*pair) for result in results for pair in zip(results[0], result, strict=True))
    vector, table = results[0]
    again = CountSketch(BIG, 3, 9001, 1)
    again.add(vector)
    assert torch.equal(bits(again.table), bits(table))


def sketch_and_choose(seed: int) -> tuple[Tensor, Tensor]:
    """A sketch by two threads, and a choice from it."""
    torch.set_num_threads(2)
    sketch = CountSketch(BIG, 3, 9001, seed)
    sketch.add(numbers(BIG, seed=seed))
    return sketch.table, torch.stack([part.double() for part in sketch.top_k(200)])


def test_calls_at_the_same_time_do_not_disturb_each_other() -> None:
    alone = [sketch_and_choose(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for expected, result in zip(alone * 4, pool.map(sketch_and_choose, list(range(8)) * 4), strict=True):
            assert torch.equal(expected[0], result[0])
            assert torch.equal(expected[1], result[1])


def _in_child(expected: Tensor) -> None:
    # PyTorch's own threads do not survive a fork, so nothing here may use them.
    sketch = CountSketch(BIG, 3, 9001)
    native.add(sketch.geometry, 0, sketch.table, _in_child_vector, 0, 1.0)
    raise SystemExit(0 if bytes(sketch.table.numpy()) == bytes(expected.numpy()) else 1)


_in_child_vector = numbers(BIG)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_threads_come_back_after_a_fork() -> None:
    torch.set_num_threads(2)
    table, _ = sketch_and_choose(0)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(table,))
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    child.join()
    assert not alive
    assert child.exitcode == 0


def test_without_the_kernel_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vector = numbers(10_000)
    expected = CountSketch(10_000, 3, 100)
    expected.add(vector)
    hvd_sketch.native._load.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(hvd_sketch.native, "EXTENSION_SUFFIXES", [])
        assert not native.available()
        sketch = CountSketch(10_000, 3, 100)
        sketch.add_many([vector[:5000], vector[5000:]], [0, 5000])
        assert torch.equal(sketch.table, expected.table)
        estimates, (indices, values) = sketch.estimate(), sketch.top_k(100)
    hvd_sketch.native._load.cache_clear()
    assert len(caplog.records) == 1
    assert "pip install" in caplog.text
    assert torch.equal(estimates, expected.estimate())
    assert torch.equal(indices, expected.top_k(100)[0])
    assert torch.equal(values, expected.top_k(100)[1])
