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
_SPANS = 1024
"""Programs that add, each to a stretch of rows."""


def put(vector: Tensor, shards: int, first: int, rows: Tensor, values: Tensor) -> None:
    """Set entries: list j of rows is of shard ``first + j``; rows and values are contiguous, ``(lists, count)``."""
    lists, count = rows.shape
    if rows.numel():
        with torch.cuda.device_of(vector):
            scatter[-(-count // _LANES), lists](vector, rows, values, shards, first, count, lanes=_LANES)


def add(vector: Tensor, shards: int, shard: int, rows: Tensor, values: Tensor) -> None:
    """Add lists to one shard, one after the other, each in ascending order."""
    lists, count = rows.shape
    if rows.numel():
        total = -(-vector.numel() // shards)
        span = -(-total // _SPANS)
        edges = torch.arange(0, total + span, span, device=rows.device)
        stops = torch.searchsorted(rows, edges.expand(lists, -1).contiguous())
        with torch.cuda.device_of(vector):
            add_lists[len(edges) - 1,](
                vector, rows, values, stops, shards, shard, lists, count, lanes=_LANES, enable_fp_fusion=False
            )


def put_in_pieces(
    pieces: Mapping[int, Tensor], shards: int, first: int, rows: Tensor, values: Tensor, *, clear: bool
) -> None:
    """As `put`, to pieces of the vector: contiguous float32 tensors by the coordinate of their first element."""
    if not pieces:
        return
    if clear:
        torch._foreach_zero_(list(pieces.values()))
    lists, count = rows.shape
    if rows.numel() == 0:
        return
    lines = ((start, start + piece.numel(), piece.data_ptr()) for start, piece in pieces.items())
    table = _on_device(tuple(chain(*lines)), rows.device)
    with torch.cuda.device_of(rows):
        scatter_in_pieces[-(-count // _LANES), lists](
            table, len(pieces), rows, values, shards, first, count, lanes=_LANES
        )


@functools.lru_cache(maxsize=64)
def _on_device(table: tuple[int, ...], device: torch.device) -> Tensor:
    """A table of pieces; they mostly are where they were in the step before."""
    pinned = device.type == "cuda"
    return torch.tensor(table, dtype=torch.int64, device="cpu", pin_memory=pinned).to(device, non_blocking=True)


@triton.jit(do_not_specialize=["shards", "first", "count"])
def scatter(
    vector: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    shards: tl.int64,
    first: tl.int64,
    count: tl.int64,
    lanes: tl.constexpr,
):
    """Set entries ``rows[j, i] * shards + first + j``. Grid: (cdiv(count, lanes), lists)."""
    number = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    entry = tl.load(rows + number * count + at, mask=at < count, other=0) * shards + first + number
    tl.store(vector + entry, tl.load(values + number * count + at, mask=at < count, other=0.0), mask=at < count)


@triton.jit(do_not_specialize=["shards", "shard", "lists", "count"])
def add_lists(
    vector: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    stops: tl.tensor,
    shards: tl.int64,
    shard: tl.int64,
    lists: tl.int64,
    count: tl.int64,
    lanes: tl.constexpr,
):
    """Add the lists' values for a stretch of rows; ``stops``: where in each list stretches begin. Grid: stretches."""
    program = tl.program_id(0).to(tl.int64)
    for number in range(lists):
        line = stops + number * (tl.num_programs(0) + 1) + program
        begin, stop = tl.load(line), tl.load(line + 1)
        for start in range(begin, stop, lanes):
            at = start + tl.arange(0, lanes)
            entry = tl.load(rows + number * count + at, mask=at < stop, other=0) * shards + shard
            value = tl.load(values + number * count + at, mask=at < stop, other=0.0)
            tl.store(vector + entry, tl.load(vector + entry, mask=at < stop, other=0.0) + value, mask=at < stop)
        tl.debug_barrier()  # the next list may add to the same entries


@triton.jit
def _piece_of(table, number, entry):
    """The last piece that starts no later than an entry."""
    low, high = number * 0, number
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + 3 * middle) <= entry:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["number", "shards", "first", "count"])
def scatter_in_pieces(
    table: tl.tensor,
    number: tl.int64,
    rows: tl.tensor,
    values: tl.tensor,
    shards: tl.int64,
    first: tl.int64,
    count: tl.int64,
    lanes: tl.constexpr,
):
    """Set entries of those pieces that there are; ``table``: start, stop and address of each. Grid: as `scatter`.

    Rows ascend, so those of a program lie in few pieces.
    """
    its = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * lanes
    at = begin + tl.arange(0, lanes)
    line = rows + its * count
    entry = tl.load(line + at, mask=at < count, other=0) * shards + first + its
    value = tl.load(values + its * count + at, mask=at < count, other=0.0)
    least = tl.load(line + begin) * shards + first + its
    most = tl.load(line + tl.minimum(begin + lanes, count) - 1) * shards + first + its
    for piece in range(_piece_of(table, number, least), _piece_of(table, number, most) + 1):
        start = tl.load(table + 3 * piece)
        inside = (at < count) & (entry >= start) & (entry < tl.load(table + 3 * piece + 1))
        to = tl.load(table + 3 * piece + 2).to(tl.pointer_type(tl.float32))
        tl.store(to + (entry - start), value, mask=inside)
