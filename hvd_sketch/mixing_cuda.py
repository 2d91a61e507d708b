"""The Hadamard transform on the GPU: both sides of a block in one pass over the memory."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1 << 12


def transform(values: Tensor, along: int, down: int, behind: int, *, inverse: bool) -> None:
    """As ``hadamard_transform`` in ``native/hadamard.cpp``; values are contiguous and float32."""
    count = values.numel()
    if count == 0:
        return
    cols, wide = count if down == 1 else behind, max(along, _TILE // down)
    across = -(-cols // wide)
    with torch.cuda.device_of(values):
        hadamard[count // (down * cols) * across,](
            values,
            cols,
            across,
            1.0 / math.sqrt(along),
            1.0 / math.sqrt(down),
            along=along,
            down=down,
            wide=wide,
            inverse=inverse,
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["across"])
def hadamard(
    values: tl.tensor,
    cols: tl.int64,
    across: tl.int64,
    along_scale: tl.float32,
    down_scale: tl.float32,
    along: tl.constexpr,
    down: tl.constexpr,
    wide: tl.constexpr,
    inverse: tl.constexpr,
):
    """A tile of blocks beside each other. Grid: tiles, ``across`` of them beside each other."""
    program = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, down * wide)
    col = program % across * wide + entry % wide
    at = (program // across * down + entry // wide) * cols + col
    tile = tl.load(values + at, mask=col < cols, other=0.0)
    if inverse:
        tile = _side(_side(tile, down, wide, down_scale), along, 1, along_scale)
    else:
        tile = _side(_side(tile, along, 1, along_scale), down, wide, down_scale)
    tl.store(values + at, tile, mask=col < cols)


@triton.jit
def _side(tile: tl.tensor, size: tl.constexpr, step: tl.constexpr, scale: tl.float32):
    """The transform of so many entries, each so far from the next."""
    if size > 1:
        tile = _butterflies(tile, step)
    if size > 2:
        tile = _butterflies(tile, 2 * step)
    if size > 4:
        tile = _butterflies(tile, 4 * step)
    if size > 8:
        tile = _butterflies(tile, 8 * step)
    if size > 16:
        tile = _butterflies(tile, 16 * step)
    if size > 32:
        tile = _butterflies(tile, 32 * step)
    return tile * scale if size > 1 else tile


@triton.jit
def _butterflies(tile: tl.tensor, width: tl.constexpr):
    """Sums and differences of entries so far apart, in their places."""
    pairs = tl.permute(tl.reshape(tile, (tile.numel // (2 * width), 2, width)), (0, 2, 1))
    one, other = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(one + other, one - other), (0, 2, 1)), (tile.numel,))
