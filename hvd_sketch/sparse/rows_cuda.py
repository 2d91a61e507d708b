"""Writing to rows of shards on the GPU: one launch, where PyTorch needs several, and no atomic addition.

An atomic addition takes numbers below 2^-126 for zero, and the rows of one list are distinct anyway.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 1024


def put(vector: Tensor, shards: int, first: int, rows: Tensor, values: Tensor) -> None:
    """Set entries: list j of rows is of shard ``first + j``; rows and values are contiguous, ``(lists, count)``."""
    _launch(vector, shards, first, rows, values, adds=False)


def add(vector: Tensor, shards: int, shard: int, rows: Tensor, values: Tensor) -> None:
    """Add lists to one shard, one after the other."""
    for its_rows, its_values in zip(rows, values, strict=True):
        _launch(vector, shards, shard, its_rows, its_values, adds=True)


def _launch(vector: Tensor, shards: int, first: int, rows: Tensor, values: Tensor, *, adds: bool) -> None:
    total, count = rows.numel(), rows.shape[-1]
    if total == 0:
        return
    with torch.cuda.device_of(vector):
        scatter[-(-total // _LANES),](
            vector, rows, values, shards, first, count, total, adds=adds, lanes=_LANES, enable_fp_fusion=False
        )


@triton.jit(do_not_specialize=["shards", "first", "count", "total"])
def scatter(
    vector: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    shards: tl.int64,
    first: tl.int64,
    count: tl.int64,
    total: tl.int64,
    adds: tl.constexpr,
    lanes: tl.constexpr,
):
    """Set or add to entries ``rows[i] * shards + first + i // count``. Grid: cdiv(total, lanes)."""
    at = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    inside = at < total
    entry = tl.load(rows + at, mask=inside, other=0) * shards + first + at // count
    value = tl.load(values + at, mask=inside, other=0.0)
    if adds:
        value += tl.load(vector + entry, mask=inside, other=0.0)
    tl.store(vector + entry, value, mask=inside)


def put_in_pieces(
    pieces: Mapping[int, Tensor], shards: int, first: int, rows: Tensor, values: Tensor, *, clear: bool
) -> None:
    """As `put`, to pieces of the vector: contiguous float32 tensors by the coordinate of their first element."""
    total, count = rows.numel(), rows.shape[-1]
    if not pieces:
        return
    if clear:
        torch._foreach_zero_(list(pieces.values()))
    if total == 0:
        return
    device = rows.device
    lines = ((start, start + piece.numel(), piece.data_ptr()) for start, piece in pieces.items())
    with torch.cuda.device_of(rows):
        scatter_in_pieces[-(-total // _LANES),](
            _on_device(tuple(chain(*lines)), device),
            len(pieces),
            rows,
            values,
            shards,
            first,
            count,
            total,
            steps=len(pieces).bit_length(),
            lanes=_LANES,
        )


@functools.lru_cache(maxsize=64)
def _on_device(table: tuple[int, ...], device: torch.device) -> Tensor:
    """A table of pieces; they mostly are where they were in the step before."""
    pinned = device.type == "cuda"
    return torch.tensor(table, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)


@triton.jit(do_not_specialize=["number", "shards", "first", "count", "total"])
def scatter_in_pieces(
    table: tl.tensor,
    number: tl.int64,
    rows: tl.tensor,
    values: tl.tensor,
    shards: tl.int64,
    first: tl.int64,
    count: tl.int64,
    total: tl.int64,
    steps: tl.constexpr,
    lanes: tl.constexpr,
):
    """Set entries of those pieces that there are; ``table``: start, stop and address of each. Grid: as `scatter`."""
    at = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    inside = at < total
    entry = tl.load(rows + at, mask=inside, other=0) * shards + first + at // count
    low, high = at * 0, at * 0 + number  # the last piece that starts no later is one of low … high - 1
    for _ in tl.static_range(steps):
        middle = (low + high) // 2
        later = tl.load(table + 3 * middle, mask=inside, other=0) <= entry
        low, high = tl.where(later, middle, low), tl.where(later, high, middle)
    start = tl.load(table + 3 * low, mask=inside, other=0)
    inside &= (entry >= start) & (entry < tl.load(table + 3 * low + 1, mask=inside, other=0))
    piece = tl.load(table + 3 * low + 2, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    tl.store(piece + (entry - start), tl.load(values + at, mask=inside, other=0.0), mask=inside)
