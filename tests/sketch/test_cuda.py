"""The GPU kernels equal the reference to the last bit: on Triton's interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.sketch import CountSketch, Geometry, reference
from hvd_sketch.sketch.geometry import TILE_WIDTH
from tests.support.triton import (
    INSTALLED,
    INTERPRETED,
    in_another_process,
    on_interpreter,
)

on_gpu = pytest.mark.skipif(
    INTERPRETED or not INSTALLED or not torch.cuda.is_available(),
    reason="needs a GPU and Triton: nothing here has one",
)
WIDE = 2 * TILE_WIDTH + 5
"""Columns of two tiles."""

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the interpreter, where each of them takes a millisecond."""
    if INTERPRETED:
        from hvd_sketch.sketch import add_cuda, cuda
        from hvd_sketch.sparse import cuda as choice

        for module in (add_cuda, cuda):
            monkeypatch.setattr(module, "_PROGRAMS", 8)
        monkeypatch.setattr(choice, "_PARTS", 2)


def bits(values: Tensor) -> Tensor:
    """What tells 0.0 from -0.0."""
    return values.contiguous().view(torch.int32)


def numbers(count: int, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes, some of them subnormal, 0.0 or -0.0, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    kind = torch.randint(4, (count,), generator=generator)
    values = torch.where(kind == 0, values * 0.0, values)
    values = torch.where(kind == 1, values.round(), values)
    return torch.where(kind == 2, values * 10.0 ** (9 * torch.randn(count, generator=generator)).clamp(-44, 4), values)


def check_add(geometry: Geometry, seed: int, vector: Tensor, offset: int, scale: float) -> Tensor:
    """Add to a table that is not empty; returns the table."""
    from hvd_sketch.sketch import cuda

    ours = numbers(geometry.rows * geometry.cols, 5).view(geometry.rows, geometry.cols).to(vector.device)
    theirs = ours.cpu()
    cuda.add(geometry, seed, ours, vector, offset, scale)
    reference.add(geometry, seed, theirs, vector.cpu(), offset, scale)
    assert torch.equal(bits(ours.cpu()), bits(theirs))
    return ours


def check_estimates(geometry: Geometry, seed: int, table: Tensor, *choices: int) -> None:
    """Estimate everything and choose each number of coordinates."""
    from hvd_sketch.sketch import cuda

    everything = reference.estimate(geometry, seed, table.cpu(), torch.arange(geometry.dim))
    order = torch.sort(everything.abs(), descending=True, stable=True).indices
    assert torch.equal(bits(cuda.estimate_all(geometry, seed, table).cpu()), bits(everything))
    for k in choices:
        chosen = order[:k].sort().values
        indices, estimates = cuda.top_k(geometry, seed, table, k)
        assert torch.equal(indices.cpu(), chosen)
        assert torch.equal(bits(estimates.cpu()), bits(everything[chosen]))


def check_bounds(sketch: CountSketch, k: int) -> None:
    """What is chosen from a table with NaN means nothing, but it is written to its place and nowhere else."""
    from hvd_sketch.sketch import cuda

    around = [
        torch.full((3 * k,), 7, dtype=dtype, device=sketch.table.device) for dtype in (torch.int64, torch.float32)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_room_for", lambda k, device: [buffer[k : 2 * k] for buffer in around])
        sketch._kernel.top_k(sketch.geometry, sketch.seed, sketch.table, k)
    for buffer in around:
        assert bool((buffer[:k] == 7).all() & (buffer[2 * k :] == 7).all())


@on_interpreter
@pytest.mark.parametrize(
    ("dim", "rows", "cols", "seed", "dtype", "programs"),
    [
        (700, 3, 33, 1, torch.float32, 64),
        (300, 1, 7, -(2**70), torch.float16, 2),
        (40, 5, 1, 2**63, torch.bfloat16, 3),
        (2500, 3, 600, (5 << 32) + 1, torch.bfloat16, 1),
        (1500, 2, 513, 3, torch.float32, 1),
        (1200, 9, 512, 4, torch.float16, 1),
        (9000, 3, WIDE, 5, torch.float32, 1),
        (3000, 4, 3 * TILE_WIDTH, 6, torch.float32, 1),
    ],
)
def test_any_shape(
    dim: int,
    rows: int,
    cols: int,
    seed: int,
    dtype: torch.dtype,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hvd_sketch.sketch import add_cuda, cuda

    for module in (add_cuda, cuda):
        monkeypatch.setattr(module, "_PROGRAMS", programs)
    geometry = Geometry(dim, rows, cols)
    start = dim // 7
    vector = numbers(dim - start - dim // 9).clamp(-60_000, 60_000).to(dtype)
    table = check_add(geometry, seed, vector, start, 0.3)
    check_estimates(geometry, seed, table, dim // 50 + 1)


@on_interpreter
@pytest.mark.parametrize("rows", [2, 3])
def test_ties_zeros_and_every_choice(rows: int) -> None:
    geometry = Geometry(600, rows, 150)
    check_estimates(geometry, 1, torch.zeros(rows, 150), 1, 599, 600)
    table = check_add(geometry, 1, (numbers(600) > 0.5).float(), 0, -1.0)
    check_estimates(geometry, 1, table, 1, 50, 300, 600)


@on_interpreter
@pytest.mark.parametrize(("margin", "cramped"), [(-9.0, False), (1.2, True)])
def test_a_sample_that_misleads_changes_nothing(margin: float, cramped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few candidates, or too little room for them: then all estimates are looked at."""
    from hvd_sketch.sketch import cuda
    from tests.sparse.test_cuda import without_room

    monkeypatch.setattr(cuda, "_MARGIN", margin)
    if cramped:
        monkeypatch.setattr(cuda, "settle", without_room)
    geometry = Geometry(1100, 3, 300)
    check_estimates(geometry, 1, check_add(geometry, 1, numbers(1100).clamp(-9, 9), 0, 1.0), 60)


@on_interpreter
def test_infinities_are_chosen_first() -> None:
    geometry = Geometry(500, 3, 600)
    vector = numbers(500)
    vector[[7, 400]] = torch.tensor([float("inf"), float("-inf")])
    check_estimates(geometry, 1, check_add(geometry, 1, vector, 0, 1.0), 2, 3)


@on_interpreter
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_a_table_that_is_not_a_number_harms_nothing(share: float) -> None:
    from hvd_sketch.sketch import cuda

    sketch = CountSketch(600, 3, 150, 1)
    sketch.table.copy_(numbers(450).view(3, 150))
    sketch.table[torch.rand(3, 150, generator=torch.Generator().manual_seed(0)) <= share] = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CountSketch, "_kernel", cuda)
        check_bounds(sketch, 60)


@on_interpreter
@pytest.mark.parametrize("start", [2**31 - 400, 2**33 + 4321])
def test_offsets_beyond_32_bits(start: int) -> None:
    geometry = Geometry(start + 800, 3, 9001)
    check_add(geometry, 5, numbers(800), start, 1.0)


@on_interpreter
def test_the_table_of_a_sum_is_the_sum_of_the_tables() -> None:
    from hvd_sketch.sketch import cuda

    geometry = Geometry(900, 3, 300)
    one, two = numbers(900, 1).round().clamp(-99, 99), numbers(900, 2).round().clamp(-99, 99)
    first, both, total = (torch.zeros(3, 300) for _ in range(3))
    cuda.add(geometry, 1, first, one, 0, 1.0)
    cuda.add(geometry, 1, both, one + 3 * two, 0, 1.0)
    cuda.add(geometry, 1, total, two, 0, 3.0)
    assert torch.equal(both, first + total)


@on_interpreter
def test_an_empty_vector_changes_nothing() -> None:
    check_add(Geometry(100, 3, 10), 1, torch.zeros(0), 100, 1.0)


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    from hvd_sketch.sketch import add_cuda, cuda_kernels, geometry_cuda

    table = {"table": "*fp32", "draws": "*i32"}
    counted = {**table, "limit": "*i32", "above": "*i64", "equal": "*i64"}
    yield geometry_cuda.draw, {"draws": "*i32"}, {"lanes": 256}
    lists = {"counts": "*i32", "starts": "*i64", "listed": "*i32"}
    for listing in (False, True):
        shape = {"lanes": 32, "together": 64, "most_parts": 32, "lists": listing}
        yield add_cuda.list_chunks, {**lists, "draws": "*i32"}, shape
    for dtype in ("*fp16", "*bf16", "*fp32"):
        shape = {"rows": 3, "lanes": 128, "ahead": 4}
        yield add_cuda.add_listed, {**table, **lists, "vector": dtype, "scale": "*fp32"}, shape
    for rows in (4, 9):
        shape = {"row_count": rows, "lanes": 512}
        yield cuda_kernels.estimate_all, {**table, "to": "*fp32"}, shape
        for lower in (False, True):
            digits = {**table, "counts": "*i64", "limit": "*i64"}
            counts = {"lower": lower, "low_bits": 15, "copies": 8, "bins": 1 << (15 if lower else 16)}
            yield cuda_kernels.count_digits, digits, {**shape, **counts}
        yield cuda_kernels.weigh, counted, shape
        candidates = {"kept_indices": "*i32", "kept": "*fp32"}
        yield cuda_kernels.collect, {**table, "limit": "*i32", "above": "*i64", **candidates}, shape
        yield cuda_kernels.write, {**counted, "ties": "*i64", "indices": "*i64", "estimates": "*fp32"}, shape


@pytest.mark.skipif(INTERPRETED, reason="asked once, in the process without the interpreter")
def test_a_processor_has_no_use_for_triton(tmp_path: Path) -> None:
    in_another_process(
        tmp_path,
        "-c",
        "import sys; from hvd_sketch.sketch import CountSketch; s = CountSketch(99, 3, 10); s.top_k(3); s.estimate()\n"
        "assert not {'triton', 'hvd_sketch.sketch.cuda'} & set(sys.modules)",
    )


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(3, 10_000), (5, 100_000), (4, 3000)])
def test_on_a_gpu(rows: int, cols: int, dtype: torch.dtype) -> None:
    geometry = Geometry(1_000_000, rows, cols)
    vector = numbers(900_000).clamp(-60_000, 60_000).to(dtype).cuda()
    table = check_add(geometry, 1, vector, 55_555, 0.3)
    check_estimates(geometry, 1, table, 1, 1000, 10_000, 1_000_000)
    check_estimates(geometry, 1, torch.zeros_like(table), 1000)


@on_gpu
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_few_and_many_rows_on_a_gpu(rows: int) -> None:
    geometry = Geometry(100_000, rows, 9001)
    table = check_add(geometry, 2, numbers(100_000).round().cuda(), 0, 1.0)
    check_estimates(geometry, 2, table, 1, 333, 100_000)


@on_gpu
@pytest.mark.parametrize("start", [2**31 - 500_000, 2**33 + 4321])
def test_offsets_beyond_32_bits_on_a_gpu(start: int) -> None:
    check_add(Geometry(start + 1_000_000, 3, 900_001), 5, numbers(1_000_000).cuda(), start, 1.0)


@on_gpu
def test_choosing_beyond_32_bits_on_a_gpu() -> None:
    """The processor's kernel, equal to the reference, is the oracle: the reference itself would take hours."""
    dim = 2**31 + 12_345_678
    ours = CountSketch(dim, 3, 2_000_000, 1, device="cuda")
    ours.add(numbers(2_000_000).cuda(), offset=dim - 2_000_000)
    theirs = CountSketch(dim, 3, 2_000_000, 1, table=ours.table.cpu())
    for one, other in zip(ours.top_k(100_000), theirs.top_k(100_000), strict=True):
        assert torch.equal(one.cpu(), other)


@on_gpu
@pytest.mark.parametrize("share", [1e-4, 0.5, 1.0])
def test_a_table_that_is_not_a_number_harms_nothing_on_a_gpu(share: float) -> None:
    sketch = CountSketch(1_000_000, 3, 10_000, 1, device="cuda")
    sketch.table[torch.rand(3, 10_000) <= share] = float("nan")
    check_bounds(sketch, 10_000)


@on_gpu
def test_nothing_waits_for_the_gpu() -> None:
    sketch, vector = CountSketch(1_000_000, 3, 10_000, 1, device="cuda"), numbers(1_000_000).cuda()
    try:
        for _ in range(2):  # the first round compiles
            sketch.reset(2)
            sketch.add(vector)
            sketch.top_k(1000)
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_what_is_recorded_chooses_as_what_is_not_on_a_gpu() -> None:
    from hvd_sketch.sketch import cuda

    sketch = CountSketch(1_000_000, 3, 10_000, device="cuda")
    for seed in range(6):  # the fourth and later ones are replayed; the fifth has many equal estimates
        sketch.reset(seed)
        sketch.add((numbers(1_000_000, seed) if seed != 4 else torch.ones(1_000_000)).cuda())
        expected = cuda.top_k(sketch.geometry, seed, sketch.table, 5000)
        for ours, theirs in zip(sketch.top_k(5000), expected, strict=True):
            assert torch.equal(ours, theirs)
