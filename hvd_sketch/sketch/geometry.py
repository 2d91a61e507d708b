"""Which cell and which sign a coordinate has: the one definition of the sketch.

A **tiled cyclic-shift Count Sketch**. The ``cols`` columns are cut into ``tiles`` tiles of ``width`` columns each.
The vector is cut into blocks of ``tiles * length`` coordinates, and each block is dealt to ``tiles`` chunks as cards
are, 64 coordinates at a time: coordinate ``i`` of block ``b`` belongs to the chunk with slot ``s`` and has position
``q`` in it, where ``i = b * tiles * length + (q div 64 * tiles + s) * 64 + q mod 64``. With ``m = b * tiles + s``::

    tile(m)      = (s + rotation(b)) mod tiles
    cell_j(i)    = tile(m) * width + (q + offset_j(m)) mod width
    sign_j(i)    = +1 or -1, a bit of a 32-bit word hashed from m and q

Two coordinates of one block never share a cell. Two of different blocks share one in row j
with probability 1/tiles * 1/width = 1/cols, over the draws of ``rotation`` and ``offset_j``, as
in the classic sketch; so a row's estimate is unbiased with variance at most ``||v||^2 / cols``.

What differs is the joint law: rows share the tile. In exchange, a tile of the table is read and written where it lies
in the first-level cache, and tiles are independent of each other, for threads as for ranks. Two sizes keep the joint
law near the classic one for vectors that are heavy in runs, as gradients are. Dealing spreads a run over many tiles,
so that no coordinate shares its tile with more of it than others do. And as a chunk is shorter than a tile is wide, a
block is much shorter than a row of the table: what is heavy together may collide, as in a classic sketch, and does
not fill every cell once. In each cell coordinates are added in ascending order, so a vector may come in slices.

Every draw is a function of (seed, index), so nothing is stored and every rank agrees.
Source of the sketch: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VERSION = 2
"""Of this definition: tables of different versions must not be summed."""
TILE_WIDTH = 2048
"""Columns a tile aims at: rows * width floats fit a first-level cache for the usual row counts."""
CHUNK = 256
"""Coordinates with the same draws; of longer chunks, wide layers were found less often than by a classic sketch."""
PIECE = 64
"""Coordinates dealt at once; of more, narrow layers were found less often."""

_GOLDEN = 0x9E3779B97F4A7C15
_STREAM = 0xD1B54A32D192ED03
_ROTATION = 1 << 21
"""Of what is drawn, the number of a block's rotation; first come the keys of a chunk's signs, then its offsets."""
_SIGNS = 16
"""Taken from one word, from its highest bit down: those of all rows in as many pieces as it has bits for."""
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
    def length(self) -> int:
        """Coordinates of one chunk."""
        return min(self.width, CHUNK)

    @property
    def block(self) -> int:
        """Coordinates of one block; no two of them share a cell."""
        return self.tiles * self.length


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


def _drawn(seed: int, number: int, index: Tensor) -> Tensor:
    """32 hashed bits for each index: the number-th of what is drawn for it."""
    word = _draw(seed, number // 2, index)
    return word & _MASK32 if number % 2 else _shift(word, 32)


def _below(bits: Tensor, bound: int) -> Tensor:
    """Map 32 hashed bits to 0 … bound - 1."""
    return (bits * bound) >> 32


def _mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit words by two rounds of xorshift and multiply; its upper half has low bias."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    return ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32


def cells_and_signs(geometry: Geometry, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Cell (int64) and sign (float32, +1 or -1) of each coordinate in each row.

    ``index`` is an int64 tensor of n coordinates; both results have shape ``(rows, n)``.
    """
    width, tiles = geometry.width, geometry.tiles
    block, place = index // geometry.block, index % geometry.block
    slot, position = place // PIECE % tiles, place // PIECE // tiles * PIECE + place % PIECE
    tile = (slot + _below(_drawn(seed, _ROTATION, block), tiles)) % tiles
    chunk = block * tiles + slot
    piece, together = position // PIECE, max(1, _SIGNS // geometry.rows)
    hashed, turn = piece // together * PIECE + position % PIECE, piece % together * geometry.rows
    keys = -(-geometry.rows // _SIGNS)
    cells, signs = [], []
    for row in range(geometry.rows):
        offset = _below(_drawn(seed, keys + row, chunk), width)
        cells.append(tile * width + (position + offset) % width)
        word = _mix32((_drawn(seed, row // _SIGNS, chunk) + hashed) & _MASK32)
        signs.append(1.0 - 2.0 * (word >> 31 - (turn + row) % _SIGNS & 1).to(torch.float32))
    return torch.stack(cells), torch.stack(signs)
