"""The GPU's choice from a vector is the reference's: on Triton's interpreter, and as compiled code.

On a GPU itself it is compared in ``tests/exchange/test_device.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.sparse.heaviest import heaviest_of_shards
from tests.support.triton import on_interpreter


def check(vector: Tensor, shards: int, count: int) -> None:
    from hvd_sketch.sparse import cuda

    ours, expected = cuda.heaviest(vector, shards, count), heaviest_of_shards(vector, shards, count)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1].view(torch.int32), expected[1].view(torch.int32))


@on_interpreter
@pytest.mark.parametrize(("shards", "runs"), [(1, 64), (3, 2), (8, 1)])
def test_the_heaviest_of_shards(shards: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.sparse import cuda

    small = {"_RUNS": runs, "_TOGETHER": 128, "_SAMPLE": 64, "_PARTS": 8, "_LANES": 64}
    for name, value in small.items():
        monkeypatch.setattr(cuda, name, value)
    size = 397
    normal = torch.randn(3 * size, generator=torch.Generator().manual_seed(shards))[1::3]  # not contiguous
    for vector in (normal**5, normal.round(), normal * (normal > 1.5) * 2.0**-130, torch.zeros(size)):
        for count in (size // shards // 30 + 1, size // shards):
            check(vector, shards, count)


def without_room(state: Tensor, counts: Tensor, size: int, count: int, room: int) -> None:
    """`settle` where there is room for one candidate."""
    from hvd_sketch.sparse import cuda_kernels

    shards, runs = counts.shape[1:]
    cuda_kernels.settle[shards,](state, *counts, size, count, 1, runs, wide=shards, most_runs=8192)


@on_interpreter
@pytest.mark.parametrize(("margin", "cramped"), [(-6.0, False), (0.0, False), (6.0, True)])
def test_a_sample_that_misleads_changes_nothing(margin: float, cramped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too narrow a bracket, or too little room for the candidates: then everything is looked at."""
    from hvd_sketch.sparse import cuda

    small = {"_TOGETHER": 128, "_SAMPLE": 64, "_PARTS": 4, "_LANES": 64, "_MARGIN": margin}
    for name, value in small.items():
        monkeypatch.setattr(cuda, name, value)
    if cramped:
        monkeypatch.setattr(cuda, "settle", without_room)
    generator = torch.Generator().manual_seed(1)
    for vector in (torch.randn(601, generator=generator) ** 3, torch.randn(601, generator=generator).round()):
        vector[::7] = torch.tensor([float("inf"), -float("inf")]).repeat(43)[: len(vector[::7])]
        for shards, count in ((1, 50), (3, 171)):
            check(vector, shards, count)


@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rows", [20_000, 1_000_000, 100_000_000])
def test_there_is_room_for_the_candidates_of_any_share(rows: int, share: float) -> None:
    """Six standard deviations of a sample: what lies above its rank's entry, and the k-th largest, is within."""
    pytest.importorskip("triton")
    from hvd_sketch.sparse import cuda

    count = max(1, int(rows * share))
    low, high = cuda._ranks(rows, count)
    room = cuda._within(rows, low)
    assert high * rows / cuda._SAMPLE <= count <= max(low * rows / cuda._SAMPLE, count)
    assert low * rows / cuda._SAMPLE < room
    least = 1 + 12 * (count * cuda._SAMPLE / rows) ** -0.5 + 100 / (count * cuda._SAMPLE / rows)
    assert room <= count * least * 1.5


@on_interpreter
def test_rows_are_set_and_added_to_as_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.sparse import rows, rows_cuda

    monkeypatch.setattr(rows_cuda, "_LANES", 16)
    monkeypatch.setattr(rows_cuda, "_SPANS", 5)
    generator = torch.Generator().manual_seed(0)
    for shards, first, lists in ((1, 0, 1), (5, 1, 3), (4, 3, 1), (3, 0, 0)):
        vector = torch.randn(307, generator=generator) * 2.0**-130
        chosen = torch.stack([torch.randperm(307 // shards, generator=generator)[:20].sort().values] * max(1, lists))
        chosen, values = chosen[:lists], torch.randn(lists, 20, generator=generator) * 2.0**-130
        ours, expected = vector.clone(), vector.clone()
        rows_cuda.put(ours, shards, first, chosen, values)
        rows.Rows(shards, first, chosen).put(expected, values)
        rows_cuda.add(ours, shards, first, chosen, values)
        rows.add(expected, shards, first, chosen, values)
        assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


@on_interpreter
def test_pieces_of_a_vector_get_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.sparse import rows, rows_cuda

    monkeypatch.setattr(rows_cuda, "_LANES", 16)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(100, generator=generator)[:20].sort().values for _ in range(3)])
    values = torch.randn(3, 20, generator=generator)
    whole = torch.zeros(307)
    rows.Rows(3, 0, chosen).put(whole, values)
    for edges in ([(0, 307)], [(0, 100), (100, 101), (101, 307)], [(5, 17), (200, 300)], []):
        pieces = {start: torch.full((stop - start,), 7.0) for start, stop in edges}
        rows_cuda.put_in_pieces(pieces, 3, 0, chosen, values, clear=True)
        for start, stop in edges:
            assert torch.equal(pieces[start], whole[start:stop])


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    from hvd_sketch.sparse import cuda_kernels, rows_cuda

    pointers = dict.fromkeys(("vector", "values", "kept"), "*fp32") | {"kept_rows": "*i32", "counts": "*i32"}
    pointers |= dict.fromkeys(("state", "above", "equal"), "*i64")
    table = {"table": "*i64", "rows": "*i64", "stops": "*i64", "values": "*fp32", "vector": "*fp32"}
    for kernel in (rows_cuda.scatter, rows_cuda.add_lists, rows_cuda.scatter_in_pieces):
        yield kernel, table, {"lanes": 1024}
    digit, results = {"digit_bits": 11, "copies": 8}, {**pointers, "chosen": "*i64"}
    yield cuda_kernels.find_digit, pointers, digit
    yield cuda_kernels.add_up, pointers, {"most_parts": 2048}
    for wide, shards in ((1, 1), (7, 8)):
        shape, lanes = {"wide": wide, "shards": shards, "rows": 512 // shards}, {"wide": wide, "lanes": 512}
        yield cuda_kernels.bracket, pointers, {"wide": wide, "sample": 1 << 14}
        yield cuda_kernels.count, results, shape
        yield cuda_kernels.settle, results, {"wide": wide, "most_runs": 8192}
        yield cuda_kernels.collect, pointers, shape
        yield cuda_kernels.count_digits, pointers, {**digit, **lanes}
        yield cuda_kernels.weigh, pointers, lanes
        yield cuda_kernels.write, results, lanes
