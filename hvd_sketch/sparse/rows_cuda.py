"""Writing to rows of shards on the GPU: one launch, where PyTorch needs several, and no atomic addition.

An atomic addition takes numbers below 2^-126 for zero, and the rows of one list are distinct anyway.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

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
