"""Adding a vector to a sketch on the GPU: the bits of `hvd_sketch.sketch.reference`.

Each program keeps some columns of one row of one tile in registers and takes the chunks that have something for them
in ascending order: no atomic operation, and the order of additions that the reference defines. Which chunks those are,
a sixth of all that the tile has, is listed before. A small table has few tiles, so the columns of a program are
halved, from 128 down to 32, until there are programs enough for a large GPU.

Memory beyond table and vector: what is drawn, and up to five words of 32 bits for each chunk and row.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.sketch.geometry import Geometry
from hvd_sketch.sketch.geometry_cuda import draws_of, flip, wrapped

_PROGRAMS = 4096
"""As many as keep a large GPU busy."""
_PART, _NARROWEST = 128, 32
"""Columns of a program, at most and at least."""
_AHEAD = 2
"""Chunks whose values are on their way at once."""
_TOGETHER = 32


def add(geometry: Geometry, seed: int, table: Tensor, vector: Tensor, offset: int, scale: float | Tensor) -> None:
    """As `reference.add`; ``vector`` is contiguous, of dtype float32, float16 or bfloat16, a tensor on its device."""
    if not vector.numel():
        return
    first_block = offset // geometry.block
    blocks = -(-(offset + vector.numel()) // geometry.block) - first_block
    first = first_block * geometry.tiles
    with torch.cuda.device_of(table):
        draws = draws_of(geometry, seed, table.device, first, blocks * geometry.tiles)
        factor = scale if isinstance(scale, Tensor) else _number(scale, table.device)
        lists = _Lists(geometry, draws, blocks)
        add_listed[geometry.rows * lists.parts * geometry.tiles,](
            table,
            draws,
            vector,
            factor,
            lists.counts,
            lists.starts,
            lists.chunks,
            first,
            offset,
            vector.numel(),
            blocks,
            geometry.cols,
            geometry.width,
            geometry.length,
            geometry.tiles,
            lists.parts,
            rows=geometry.rows,
            lanes=lists.columns,
            ahead=_AHEAD,
            num_warps=1,
            enable_fp_fusion=False,
        )


class _Lists:
    """Of each row of a tile, cut into parts of some columns: which chunks there are for each part."""

    def __init__(self, geometry: Geometry, draws: Tensor, blocks: int) -> None:
        cells = geometry.rows * geometry.tiles * geometry.width
        columns = min(_PART, max(_NARROWEST, 1 << (geometry.width - 1).bit_length()))
        while columns > _NARROWEST and cells < columns * _PROGRAMS:
            columns //= 2
        self.columns, self.parts = columns, -(-geometry.width // columns)
        lines, device = geometry.rows * geometry.tiles, draws.device
        most = min(self.parts, -(-geometry.length // columns) + 3)  # parts that one chunk has something for
        self.counts = torch.empty(lines * self.parts, dtype=torch.int32, device=device)
        self.chunks = torch.empty(draws.shape[1] * geometry.rows * most, dtype=torch.int32, device=device)
        self.starts = torch.empty(lines * self.parts, dtype=torch.int64, device=device)
        self._look(geometry, draws, blocks, lists=False)
        torch.sub(self.counts.cumsum(0), self.counts, out=self.starts)
        self._look(geometry, draws, blocks, lists=True)

    def _look(self, geometry: Geometry, draws: Tensor, blocks: int, *, lists: bool) -> None:
        """Count the chunks of each part, or list them."""
        list_chunks[geometry.rows * geometry.tiles,](
            self.counts,
            self.starts,
            self.chunks,
            draws,
            blocks,
            geometry.rows,
            geometry.width,
            geometry.length,
            geometry.tiles,
            self.parts,
            lanes=self.columns,
            together=_TOGETHER,
            most_parts=1 << (self.parts - 1).bit_length(),
            lists=lists,
        )


@functools.lru_cache(maxsize=64)
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=["blocks", "rows", "width", "length", "tiles", "parts"])
def list_chunks(
    counts: tl.tensor,
    starts: tl.tensor,
    listed: tl.tensor,
    draws: tl.tensor,
    blocks: tl.int64,
    rows: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    parts: tl.int64,
    lanes: tl.constexpr,
    together: tl.constexpr,
    most_parts: tl.constexpr,
    lists: tl.constexpr,
):
    """Of each part of lanes columns of a tile and row: which chunks have something for it, in ascending order.

    Without ``lists`` only ``counts`` is written; with it, ``starts`` says where the list of each part begins.
    ``together`` blocks are looked at at once. Grid: rows * tiles.
    """
    program = tl.program_id(0).to(tl.int64)
    row, tile = program % rows, program // rows
    span, size = width.to(tl.int32), length.to(tl.int32)
    part = tl.arange(0, most_parts)
    line = program * parts + part
    number = tl.zeros((most_parts,), tl.int32)
    if lists:
        start = tl.load(starts + line, mask=part < parts, other=0)
    for first in range(0, blocks, together):
        block = first + tl.arange(0, together)
        there = block < blocks
        slot = wrapped(tile - tl.load(draws + block * tiles, mask=there, other=0), tiles)
        chunk = block * tiles + slot
        shift = tl.load(draws + (2 + row) * blocks * tiles + chunk, mask=there, other=0)
        ahead = wrapped(part[None, :] * lanes - shift[:, None], span)
        meets = (there[:, None] & (part < parts)[None, :]) & ((ahead < size) | (ahead + lanes > span))
        met = meets.to(tl.int32)
        if lists:
            at = (start + number)[None, :] + tl.cumsum(met, axis=0) - met
            tl.store(listed + at, chunk.to(tl.int32)[:, None] + tl.zeros_like(met), mask=meets)
        number += tl.sum(met, axis=0)
    if not lists:
        tl.store(counts + line, number, mask=part < parts)


@triton.jit(do_not_specialize=["first", "offset", "count", "blocks", "cols", "width", "length", "tiles", "parts"])
def add_listed(
    table: tl.tensor,
    draws: tl.tensor,
    vector: tl.tensor,
    scale: tl.tensor,
    counts: tl.tensor,
    starts: tl.tensor,
    listed: tl.tensor,
    first: tl.int64,
    offset: tl.int64,
    count: tl.int64,
    blocks: tl.int64,
    cols: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    parts: tl.int64,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    ahead: tl.constexpr,
):
    """Add the vector to the table; ``first`` is the chunk with which ``draws`` begins, and a block too.

    A program keeps lanes columns of one tile and row in registers and adds to them, in order, what each chunk on their
    list has for them, the values of ``ahead`` chunks on their way at once. Programs of one tile follow each other, so
    they read the same chunks at the same time, from the cache. Grid: rows * parts * tiles.
    """
    program = tl.program_id(0).to(tl.int64)
    row, part, tile = program % rows, program // rows % parts, program // rows // parts
    span, size, stride = width.to(tl.int32), length.to(tl.int32), (tiles * 64).to(tl.int32)
    column = (part * lanes).to(tl.int32) + tl.arange(0, lanes)
    inside = column < span
    cells = table + (row * cols + tile * width) + column
    sums = tl.load(cells, mask=inside)
    factor = tl.load(scale)
    line = (tile * rows + row) * parts + part
    begin = tl.load(starts + line)
    end = begin + tl.load(counts + line)
    for start in range(begin, end, ahead):
        added, taken = (), ()
        for number in tl.static_range(ahead):
            there = start + number < end
            chunk = tl.load(listed + start + number, mask=there, other=0)
            key = tl.load(draws + blocks * tiles + chunk)
            shift = tl.load(draws + (2 + row) * blocks * tiles + chunk)
            block = chunk // tiles.to(tl.int32)
            slot = chunk - block * tiles.to(tl.int32)
            position = wrapped(column - shift, span)
            base = first * length + block.to(tl.int64) * (tiles * length) + slot * 64 - offset
            at = base + (position // 64 * stride + position % 64)
            used = inside & (position < tl.where(there, size, 0)) & (at >= 0) & (at < count)
            value = tl.load(vector + at, mask=used, other=0.0).to(tl.float32) * factor
            added += (flip(value, key, position // 64, position % 64, row.to(tl.int32), rows),)
            taken += (used,)
        for number in tl.static_range(ahead):
            sums = tl.where(taken[number], sums + added[number], sums)
    tl.store(cells, sums, mask=inside)
