"""The GPU kernels: same functions and, for tables without NaN, same results to the last bit as `reference`.

Importing this module needs Triton. Nothing here waits for the GPU: sizes are known beforehand, and what is found on
the device stays there. Memory beyond table, vector and results: what is drawn, ``2 + rows`` words of 32 bits for each
chunk of 256 coordinates, about four words for each chunk and row to add, and space for the candidates.

**Adding.** Each program keeps some columns of one row of one tile in registers and takes the chunks that have
something for them in ascending order: no atomic operation, and the order of additions that the reference defines.
Which chunks those are, a sixth of all that the tile has, is listed before. A small table has few tiles, so the columns
of a program are halved, from 128 down to 32, until there are programs enough for a large GPU.

**Choosing.** The estimates are computed anew in each pass over the table, which is small, and never stored:

1. count the upper 16 bits of magnitudes in every 64th step: that tells about how large the k-th largest is;
2. count, in each run of coordinates, those somewhat below it and above: the candidates;
3. write the candidates where the counts before say, in ascending order;
4. choose among them; see `hvd_sketch.sparse.cuda`.

Should the candidates be too few, or too many, because the k-th largest is one of many equal ones, it is found digit by
digit among all estimates, in passes that otherwise do nothing. The result is the same.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.gpu import Recorded, find_digit
from hvd_sketch.sketch import cuda_kernels as kernels
from hvd_sketch.sketch.geometry import PIECE, Geometry
from hvd_sketch.sparse.cuda import Candidates, settle
from hvd_sketch.sparse.cuda_kernels import COLLECTED, FIELDS, HIGH, LOW

_PROGRAMS = 4096
"""As many as keep a large GPU busy."""
_LANES = 1024
_PART, _NARROWEST = 128, 32
"""Columns of a program that adds, at most and at least."""
_AHEAD = 2
"""Chunks whose values are on their way at once."""
_TOGETHER = 32
_SAMPLE = 64
_MARGIN = 1.2
_COPIES = 8
"""Of the counts, to be added up: so fewer programs meet at an address."""
_DRAWN_TOGETHER = 256
_LOW_BITS = 15
_DIGITS = 1 << (31 - _LOW_BITS)
_MOST_CANDIDATES = 2**31
"""Of coordinates: an index of a candidate has 32 bits."""


def add(geometry: Geometry, seed: int, table: Tensor, vector: Tensor, offset: int, scale: float | Tensor) -> None:
    """As `reference.add`; ``vector`` is contiguous, of dtype float32, float16 or bfloat16, a tensor on its device."""
    if not vector.numel():
        return
    first_block = offset // geometry.block
    blocks = -(-(offset + vector.numel()) // geometry.block) - first_block
    first = first_block * geometry.tiles
    with torch.cuda.device_of(table):
        draws = _draws(geometry, seed, table.device, first, blocks * geometry.tiles)
        factor = scale if isinstance(scale, Tensor) else _number(scale, table.device)
        lists = _Lists(geometry, draws, blocks)
        kernels.add[geometry.rows * lists.parts * geometry.tiles,](
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
        columns = _power_of_two(geometry.width, _NARROWEST, _PART)
        while columns > _NARROWEST and cells < columns * _PROGRAMS:
            columns //= 2
        self.columns, self.parts = columns, -(-geometry.width // columns)
        lines, device = geometry.rows * geometry.tiles, draws.device
        most = min(self.parts, -(-geometry.length // columns) + 3)  # parts that one chunk has something for
        self.counts = torch.empty(lines * self.parts, dtype=torch.int32, device=device)
        self.chunks = torch.empty(draws.shape[1] * geometry.rows * most, dtype=torch.int32, device=device)
        self.starts = torch.empty(lines * self.parts, dtype=torch.int64, device=device)
        for lists in (False, True):
            kernels.list_chunks[lines,](
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
                lanes=columns,
                together=_TOGETHER,
                most_parts=1 << (self.parts - 1).bit_length(),
                lists=lists,
            )
            torch.sub(self.counts.cumsum(0), self.counts, out=self.starts)


def estimate_all(geometry: Geometry, seed: int, table: Tensor) -> Tensor:
    """The estimates (float32) of all ``geometry.dim`` coordinates."""
    estimates = torch.empty(geometry.dim, dtype=torch.float32, device=table.device)
    with torch.cuda.device_of(table):
        passes = _Passes(geometry, _all_draws(geometry, seed, table.device), table)
        passes.launch(kernels.estimate_all, passes.steps, estimates)
    return estimates


def top_k(geometry: Geometry, seed: int, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.top_k`, without waiting for the GPU."""
    with torch.cuda.device_of(table):
        return _top_k(geometry, _all_draws(geometry, seed, table.device), table, k)


class Chooser:
    """`top_k` of one table for ever new seeds: what it launches is recorded; see `Recorded`."""

    def __init__(self, geometry: Geometry, table: Tensor, k: int) -> None:
        self._geometry, self._table, self._k = geometry, table, k
        self._draws: Tensor | None = None
        self._choose = Recorded(self._of_table, table.device)

    def __call__(self, seed: int) -> tuple[Tensor, Tensor]:
        """As `top_k`."""
        with torch.cuda.device_of(self._table):
            self._draws = _all_draws(self._geometry, seed, self._table.device, self._draws)
            indices, estimates = self._choose()
            return indices.clone(), estimates.clone()

    def _of_table(self) -> tuple[Tensor, Tensor]:
        assert self._draws is not None
        return _top_k(self._geometry, self._draws, self._table, self._k)


def _top_k(geometry: Geometry, draws: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices, estimates = _room_for(k, table.device)
    passes = _Passes(geometry, draws, table)
    if geometry.dim < _MOST_CANDIDATES:
        collected = passes.choose_from_candidates(indices, estimates)
    else:
        collected = torch.zeros(1, 1, dtype=torch.bool, device=table.device)
    passes.choose_from_all(indices, estimates, collected)
    return indices, estimates


@functools.lru_cache(maxsize=64)
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _room_for(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For what is chosen: indices and estimates."""
    return torch.empty(k, dtype=torch.int64, device=device), torch.empty(k, dtype=torch.float32, device=device)


class _Passes:
    """What the passes over all estimates of a table have in common."""

    def __init__(self, geometry: Geometry, draws: Tensor, table: Tensor) -> None:
        self._geometry, self._table, self._draws = geometry, table, draws
        blocks = -(-geometry.dim // geometry.block)
        self._lanes = _power_of_two(geometry.block, PIECE, _LANES)
        self._chunks = blocks * geometry.tiles
        self.steps = blocks * -(-geometry.block // self._lanes)
        self.run = -(-self.steps // (2 * _PROGRAMS))
        self.runs = -(-self.steps // self.run)

    def choose_from_candidates(self, indices: Tensor, estimates: Tensor) -> Tensor:
        """Write what is chosen, if the sample tells of the right candidates; whether it did, ``(1, 1)``."""
        k, device = indices.numel(), indices.device
        times = self.steps / -(-self.steps // _SAMPLE)
        rank = max(1, int(_MARGIN * k / times) + 32)
        room = min(self._geometry.dim, max(k, int(times * (rank + 8.0 * math.sqrt(rank)))))
        wanted = torch.full((1, 1), rank, dtype=torch.int64, device=device)
        nothing, everything = torch.zeros_like(wanted), torch.full_like(wanted, _DIGITS)
        floor, _ = find_digit(self._digits(nothing, everything, stride=_SAMPLE), wanted)
        low = ((floor << _LOW_BITS) - 1).clamp_(min=0)
        state = torch.zeros(1, FIELDS.value, dtype=torch.int64, device=device)
        state[:, LOW.value : LOW.value + 1] = low
        state[:, HIGH.value] = 0x7FFFFFFF
        counts = torch.zeros(3, 1, self.runs, dtype=torch.int64, device=device)
        low = low.to(torch.int32)
        self.launch(kernels.weigh, self.runs, low, counts[0], torch.empty_like(counts[1]), run=self.run)
        settle(state, counts, 0, k, room)
        candidates = Candidates(estimates, state, room)
        collected = state[:, COLLECTED.value : COLLECTED.value + 1] != 0
        limit = low.where(collected, -1)
        to = (candidates.rows, candidates.values)
        self.launch(kernels.collect, self.runs, limit, counts[0], *to, run=self.run, room=room)
        candidates.write(indices.unsqueeze(0), estimates.unsqueeze(0))
        return collected

    def choose_from_all(self, indices: Tensor, estimates: Tensor, done: Tensor) -> None:
        """Write what is chosen, unless that is done."""
        k = indices.numel()
        wanted = torch.full(done.shape, k, dtype=torch.int64, device=done.device)
        beyond = torch.full_like(wanted, _DIGITS).masked_fill_(done, 0)
        upper, within = find_digit(self._digits(torch.zeros_like(wanted), beyond), wanted)
        lower, ties = find_digit(self._digits(upper, beyond, lower=True), within)
        limit = ((upper << _LOW_BITS) + lower).masked_fill_(done, -1).to(torch.int32)
        counts = torch.empty(2, self.runs, dtype=torch.int64, device=limit.device)
        self.launch(kernels.weigh, self.runs, limit, *counts, run=self.run)
        before = counts.cumsum(1) - counts
        to = (indices, estimates)
        self.launch(kernels.write, self.runs, limit, ties, *before, *to, k=k, run=self.run)

    def launch(self, kernel: Any, programs: int, *tensors: Tensor, **numbers: int) -> None:
        """Run a kernel on the table, with tensors and numbers of its own."""
        geometry = self._geometry
        kernel[programs,](
            self._table,
            self._draws,
            *tensors,
            dim=geometry.dim,
            cols=geometry.cols,
            width=geometry.width,
            length=geometry.length,
            tiles=geometry.tiles,
            chunks=self._chunks,
            steps=self.steps,
            row_count=geometry.rows,
            lanes=self._lanes,
            **numbers,
            enable_fp_fusion=False,
        )

    def _digits(self, limit: Tensor, beyond: Tensor, *, lower: bool = False, stride: int = 1) -> Tensor:
        """How many magnitudes have each value of a digit, from 0 on, as far as the limits let them count."""
        bins = 1 << _LOW_BITS if lower else _DIGITS
        counts = torch.zeros(_COPIES, bins, dtype=torch.int64, device=limit.device)
        shape = {"stride": stride, "lower": lower, "low_bits": _LOW_BITS, "copies": _COPIES, "bins": bins}
        self.launch(kernels.count_digits, self.runs, counts, torch.cat([limit, beyond]), **shape)
        return counts.sum(dim=0, keepdim=True)


def _power_of_two(number: int, least: int, most: int) -> int:
    """That or the next larger one, within bounds."""
    return min(most, max(least, 1 << (number - 1).bit_length()))


def _all_draws(geometry: Geometry, seed: int, device: torch.device, into: Tensor | None = None) -> Tensor:
    """What is drawn for all chunks."""
    return _draws(geometry, seed, device, 0, -(-geometry.dim // geometry.block) * geometry.tiles, into)


def _draws(
    geometry: Geometry, seed: int, device: torch.device, first: int, chunks: int, into: Tensor | None = None
) -> Tensor:
    """What is drawn for the chunks ``first, first + 1, …``; see `hvd_sketch.sketch.cuda_kernels`."""
    draws = torch.empty(2 + geometry.rows, chunks, dtype=torch.int32, device=device) if into is None else into
    grid = (-(-chunks // _DRAWN_TOGETHER), 2 + geometry.rows)
    word = (seed + 2**63) % 2**64 - 2**63
    kernels.draw[grid](
        draws, word, first, chunks, geometry.width, geometry.tiles, lanes=_DRAWN_TOGETHER, enable_fp_fusion=False
    )
    return draws
