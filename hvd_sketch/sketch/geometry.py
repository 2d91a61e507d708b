"""Which bucket and which sign a coordinate has: the one definition of the sketch.

A **tiled cyclic-shift Count Sketch**. The ``cols`` columns are cut into ``tiles`` tiles of
``width`` columns each, the vector into chunks of ``width`` coordinates; ``tiles`` consecutive
chunks form a block. Coordinate ``i`` sits at position ``q = i mod width`` of chunk
``m = i div width``, which is slot ``m mod tiles`` of block ``b = m div tiles``::

    tile(m)      = (m mod tiles + rotation(b)) mod tiles
    bucket_j(i)  = tile(m) * width + (q + offset_j(m)) mod width
    sign_j(i)    = +1 or -1, bit j of a 32-bit word hashed from (m, q)

Two coordinates of one block never share a bucket. Two of different blocks share one in row j
with probability 1/tiles * 1/width = 1/cols, over the draws of ``rotation`` and ``offset_j``, as
in the classic sketch; so a row's estimate is unbiased with variance at most ``||v||^2 / cols``.
What differs is only the joint law: rows share the tile. In exchange, a tile of the table and
the chunks that fall into it are read and written in long runs that fit the first-level cache,
and tiles are independent of each other, for threads as for ranks.

Every draw is a function of (seed, index), so nothing is stored and every rank agrees.
Source of the sketch: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_WIDTH = 2048
"""Columns a tile aims at: rows * width floats fit a first-level cache for the usual row counts."""

_GOLDEN = 0x9E3779B97F4A7C15
_STREAM = 0xD1B54A32D192ED03
_SIGN_STREAM = 1 << 20
_ROTATION_STREAM = 1 << 21
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Geometry:
    """The shape of a sketch: ``dim`` coordinates into a table of ``rows`` by ``cols``.

    At most ``cols / TILE_WIDTH`` columns at the end of the table stay unused, so that all
    tiles have one width.
    """

    dim: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        for name in ("dim", "rows", "cols"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"CountSketch: {name} must be an integer of at least 1, got {value!r}")
        if self.cols >= 2**31:
            raise ValueError(f"CountSketch: cols must be below 2^31, got {self.cols}")

    @property
    def tiles(self) -> int:
        return max(1, self.cols // TILE_WIDTH)

    @property
    def width(self) -> int:
        return self.cols // self.tiles

    @property
    def block(self) -> int:
        """Coordinates of one block; no two of them share a bucket."""
        return self.tiles * self.width


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of 64-bit words held as int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64: the finaliser of Steele, Lea, Flood (2014) over a Weyl sequence."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _draw(seed: int, stream: int, index: Tensor) -> Tensor:
    """64 hashed bits for each index of one stream of one seed."""
    start = torch.tensor(_signed(seed + stream * _STREAM), dtype=torch.int64, device=index.device)
    return _mix64(_mix64(start) ^ index)


def _below(bits: Tensor, bound: int) -> Tensor:
    """Map 64 hashed bits to 0 … bound - 1, by the upper 32 of them."""
    return (_shift(bits, 32) * bound) >> 32


def _mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit words with low bias: two rounds of xorshift and multiply."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def buckets_and_signs(geometry: Geometry, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Bucket (int64) and sign (float32, +1 or -1) of each coordinate in each row.

    ``index`` is an int64 tensor of n coordinates; both results have shape ``(rows, n)``.
    """
    width, tiles = geometry.width, geometry.tiles
    chunk, position = index // width, index % width
    rotation = _below(_draw(seed, _ROTATION_STREAM, chunk // tiles), tiles)
    tile = (chunk % tiles + rotation) % tiles
    buckets, signs = [], []
    for row in range(geometry.rows):
        offset = _below(_draw(seed, row, chunk), width)
        buckets.append(tile * width + (position + offset) % width)
        key = _draw(seed, _SIGN_STREAM + row // 32, chunk) & _MASK32
        bit = (_mix32((key + position) & _MASK32) >> (row % 32)) & 1
        signs.append(1.0 - 2.0 * bit.to(torch.float32))
    return torch.stack(buckets), torch.stack(signs)
