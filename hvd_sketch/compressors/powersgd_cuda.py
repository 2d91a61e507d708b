"""Orthonormal bases of many thin matrices by one launch, where a QR decomposition takes ten for each."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 1024


def orthonormalize(matrices: Tensor, places: Tensor, columns: int) -> None:
    """Replace the columns of each matrix by an orthonormal basis of what they span, in place.

    Gram and Schmidt's way, each column twice, summed in float64; a column that depends on those before it becomes
    zero, to rounding.

    Args:
        matrices: one after the other, float32, each with this many columns.
        places: int64 ``(number, 2)``, where each begins, and its rows.
        columns: few, for each is compared with all before it.
    """
    with torch.cuda.device_of(matrices):
        gram_schmidt[len(places),](
            matrices, places, columns=columns, lanes=_LANES, num_warps=8, enable_fp_fusion=False
        )


@triton.jit
def gram_schmidt(matrices: tl.tensor, places: tl.tensor, columns: tl.constexpr, lanes: tl.constexpr):
    """Grid: matrices."""
    program = tl.program_id(0).to(tl.int64)
    matrix = matrices + tl.load(places + 2 * program)
    rows = tl.load(places + 2 * program + 1)
    for column in tl.static_range(columns):
        for before in tl.static_range(2 * column):
            share = _product(matrix, rows, column, before % column, columns, lanes)
            for first in range(0, rows, lanes):
                at = first + tl.arange(0, lanes)
                other = tl.load(matrix + at * columns + before % column, mask=at < rows, other=0.0).to(tl.float64)
                value = tl.load(matrix + at * columns + column, mask=at < rows, other=0.0).to(tl.float64)
                tl.store(matrix + at * columns + column, (value - share * other).to(tl.float32), mask=at < rows)
            tl.debug_barrier()
        norm = tl.sqrt(_product(matrix, rows, column, column, columns, lanes))
        scale = tl.where(norm > 0.0, 1.0 / norm, 0.0)
        for first in range(0, rows, lanes):
            at = first + tl.arange(0, lanes)
            value = tl.load(matrix + at * columns + column, mask=at < rows, other=0.0).to(tl.float64)
            tl.store(matrix + at * columns + column, (value * scale).to(tl.float32), mask=at < rows)
        tl.debug_barrier()


@triton.jit
def _product(matrix, rows, one, other, columns: tl.constexpr, lanes: tl.constexpr):
    """The scalar product of two columns."""
    total = tl.zeros((lanes,), tl.float64)
    for first in range(0, rows, lanes):
        at = first + tl.arange(0, lanes)
        left = tl.load(matrix + at * columns + one, mask=at < rows, other=0.0).to(tl.float64)
        right = tl.load(matrix + at * columns + other, mask=at < rows, other=0.0).to(tl.float64)
        total += left * right
    return tl.sum(total)
