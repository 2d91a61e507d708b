"""Which cell and which sign a coordinate has, on the GPU: the bits of `hvd_sketch.sketch.geometry`.

What is drawn for a chunk is drawn once, by `draw`, and kept as ``draws``, int32 of shape ``(2 + rows, chunks)``: the
tile, the key of the sign words, and each row's offset. The kernels that use them hash 32 bits for each coordinate and
row.

Signs are applied by flipping the sign bit, so no product is followed by a sum that a compiler could fuse with it, and
every result has the bits of `hvd_sketch.sketch.reference`.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.sketch.geometry import Geometry

_DRAWN_TOGETHER = 256


def all_draws(geometry: Geometry, seed: int, device: torch.device, into: Tensor | None = None) -> Tensor:
    """What is drawn for all chunks."""
    return draws_of(geometry, seed, device, 0, -(-geometry.dim // geometry.block) * geometry.tiles, into)


def draws_of(
    geometry: Geometry, seed: int, device: torch.device, first: int, chunks: int, into: Tensor | None = None
) -> Tensor:
    """What is drawn for the chunks ``first, first + 1, …``; a new tensor or ``into``."""
    draws = torch.empty(2 + geometry.rows, chunks, dtype=torch.int32, device=device) if into is None else into
    grid = (-(-chunks // _DRAWN_TOGETHER), 2 + geometry.rows)
    word = (seed + 2**63) % 2**64 - 2**63
    draw[grid](
        draws, word, first, chunks, geometry.width, geometry.tiles, lanes=_DRAWN_TOGETHER, enable_fp_fusion=False
    )
    return draws


@triton.jit
def _mix64(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def drawn(seed, number, index):
    """32 bits for each index, as int64: the number-th of what is drawn for it."""
    start = _mix64(seed.to(tl.uint64) + (number // 2).to(tl.uint64) * 0xD1B54A32D192ED03)
    word = _mix64(start ^ index.to(tl.uint64))
    return (tl.where(number % 2 == 0, word >> 32, word) & 0xFFFFFFFF).to(tl.int64)


@triton.jit
def below(bits, bound):
    return (bits * bound) >> 32


@triton.jit(do_not_specialize=["seed", "first", "chunks", "width", "tiles"])
def draw(
    draws: tl.tensor,
    seed: tl.int64,
    first: tl.int64,
    chunks: tl.int64,
    width: tl.int64,
    tiles: tl.int64,
    lanes: tl.constexpr,
):
    """Fill ``draws`` for the chunks ``first, first + 1, …``. Grid: (cdiv(chunks, lanes), 2 + rows)."""
    line = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    chunk = first + column
    if line == 0:
        rotation = below(drawn(seed, line + (1 << 21), chunk // tiles), tiles)
        word = (chunk % tiles + rotation) % tiles
    elif line == 1:
        word = drawn(seed, line - 1, chunk)
    else:
        word = below(drawn(seed, line - 1, chunk), width)
    tl.store(draws + line * chunks + column, word.to(tl.int32), mask=column < chunks)


@triton.jit
def flip(value, key, piece, place, row, rows: tl.constexpr):
    """The value with the sign that a place of a piece has in this row; one word has signs for 16 // rows pieces."""
    together: tl.constexpr = 16 // rows
    word = _mix32(key.to(tl.uint32, bitcast=True) + (piece // together * 64 + place).to(tl.uint32))
    sign = (word << (piece % together * rows + row).to(tl.uint32)) & 0x80000000
    return (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def wrapped(number, bound):
    """A number from -bound to bound - 1, modulo the bound."""
    return tl.where(number < 0, number + bound, number)
