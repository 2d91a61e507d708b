"""The GPU kernels: same functions and, for tables without NaN, same results to the last bit as `reference`.

Importing this module needs Triton. Nothing here waits for the GPU: sizes are known beforehand, and what is found on
the device stays there. Memory beyond table, vector and results: what is drawn, ``2 + rows`` words of 32 bits for each
chunk of 256 coordinates, and a megabyte to choose with.

**Adding.** Each program keeps some columns of one row of one tile in registers and takes the blocks in ascending
order: no atomic operation, and the order of additions that the reference defines. A small table has few tiles, so
the columns of a program are halved, from 512 down to 32, until there are programs enough for a large GPU.

**Choosing.** The estimates are computed anew in each pass over the table, which is small, and never stored:

1. count the upper 16 bits of magnitudes, and find in which of these bins the k-th largest lies;
2. count the lower 15 bits of those in the bin: now the k-th largest is known;
3. count, in each run of coordinates, those above it and those equal to it;
4. write them where the counts before say, in ascending order.

Before 1, the same is counted in every 64th step: that tells about how large the k-th largest is, and 1 need not count
what lies well below, which saves most of its atomic additions. Should it be too few after all, the others are counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_sketch.gpu import find_digit
from hvd_sketch.sketch import cuda_kernels as kernels
from hvd_sketch.sketch.geometry import Geometry

_PROGRAMS = 4096
"""As many as keep a large GPU busy."""
_WIDEST, _NARROWEST = 512, 32
_SAMPLE = 64
_MARGIN = 1.2
_COPIES = 8
"""Of the counts, to be added up: so fewer programs meet at an address."""
_DRAWN_TOGETHER = 256
_LOW_BITS = 15
_DIGITS = 1 << (31 - _LOW_BITS)


def add(geometry: Geometry, seed: int, table: Tensor, vector: Tensor, offset: int, scale: float) -> None:
    """As `reference.add`; ``vector`` is contiguous, of dtype float32, float16 or bfloat16."""
    if not vector.numel():
        return
    first_block = offset // geometry.block
    blocks = -(-(offset + vector.numel()) // geometry.block) - first_block
    first = first_block * geometry.tiles
    cells = geometry.rows * geometry.tiles * geometry.width
    columns = _columns(geometry.width)
    while columns > _NARROWEST and cells < columns * _PROGRAMS:
        columns //= 2
    parts = -(-geometry.width // columns)
    with torch.cuda.device_of(table):
        draws = _draws(geometry, seed, table.device, first, blocks * geometry.tiles)
        kernels.add[geometry.rows * parts * geometry.tiles,](
            table,
            draws,
            vector,
            scale,
            first,
            offset,
            vector.numel(),
            blocks,
            geometry.rows,
            geometry.cols,
            geometry.width,
            geometry.length,
            geometry.tiles,
            parts,
            lanes=columns,
            num_warps=max(1, columns // 256),
            enable_fp_fusion=False,
        )


def estimate_all(geometry: Geometry, seed: int, table: Tensor) -> Tensor:
    """The estimates (float32) of all ``geometry.dim`` coordinates."""
    estimates = torch.empty(geometry.dim, dtype=torch.float32, device=table.device)
    with torch.cuda.device_of(table):
        passes = _Passes(geometry, seed, table)
        passes.launch(kernels.estimate_all, passes.steps, estimates)
    return estimates


def top_k(geometry: Geometry, seed: int, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.top_k`, without waiting for the GPU."""
    indices, estimates = _room_for(k, table.device)
    with torch.cuda.device_of(table):
        passes = _Passes(geometry, seed, table)
        wanted = torch.full((1, 1), k, dtype=torch.int64, device=table.device)
        nothing, everything = torch.zeros_like(wanted), torch.full_like(wanted, _DIGITS)
        sample = passes.digits(nothing, everything, stride=_SAMPLE)
        floor, _ = find_digit(sample, torch.full_like(wanted, int(_MARGIN * k / _SAMPLE) + 32))
        counts = passes.digits(floor, everything)
        missing = torch.where(
            counts.sum() < k, nothing, floor
        )  # where the sample misled, what lies below is counted too
        upper, within = find_digit(counts + passes.digits(missing, floor), wanted)
        lower, ties = find_digit(passes.digits(upper, everything, lower=True), within)
        limit = ((upper << _LOW_BITS) + lower).to(torch.int32)
        before_above, before_equal = passes.before(limit)
        passes.launch(
            kernels.write,
            passes.runs,
            limit,
            ties,
            before_above,
            before_equal,
            indices,
            estimates,
            k=k,
            run=passes.run,
        )
    return indices, estimates


def _room_for(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For what is chosen: indices and estimates."""
    return torch.empty(k, dtype=torch.int64, device=device), torch.empty(k, dtype=torch.float32, device=device)


class _Passes:
    """What the passes over all estimates of a table have in common."""

    def __init__(self, geometry: Geometry, seed: int, table: Tensor) -> None:
        self._geometry, self._table = geometry, table
        blocks = -(-geometry.dim // geometry.block)
        self._lanes = _columns(geometry.block)
        self._chunks = blocks * geometry.tiles
        self.steps = blocks * -(-geometry.block // self._lanes)
        self.run = -(-self.steps // (2 * _PROGRAMS))
        self.runs = -(-self.steps // self.run)
        self._draws = _draws(geometry, seed, table.device, 0, self._chunks)

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

    def digits(self, limit: Tensor, beyond: Tensor, *, lower: bool = False, stride: int = 1) -> Tensor:
        """How many magnitudes have each value of a digit, from 0 on, as far as the limits let them count."""
        bins = 1 << _LOW_BITS if lower else _DIGITS
        counts = torch.zeros(_COPIES, bins, dtype=torch.int64, device=limit.device)
        shape = {"stride": stride, "lower": lower, "low_bits": _LOW_BITS, "copies": _COPIES, "bins": bins}
        self.launch(kernels.count_digits, self.runs, counts, torch.cat([limit, beyond]), **shape)
        return counts.sum(dim=0, keepdim=True)

    def before(self, limit: Tensor) -> tuple[Tensor, Tensor]:
        """How many magnitudes before each run of steps lie above the limit, and how many are equal to it."""
        counts = torch.empty(2, self.runs, dtype=torch.int64, device=limit.device)
        self.launch(kernels.weigh, self.runs, limit, counts[0], counts[1], run=self.run)
        above, equal = counts.cumsum(1) - counts
        return above, equal


def _columns(width: int) -> int:
    """Of so many columns or coordinates, those that a program takes at once: a power of two."""
    return min(_WIDEST, max(_NARROWEST, 1 << (width - 1).bit_length()))


def _draws(geometry: Geometry, seed: int, device: torch.device, first: int, chunks: int) -> Tensor:
    """What is drawn for the chunks ``first, first + 1, …``; see `hvd_sketch.sketch.cuda_kernels`."""
    draws = torch.empty(2 + geometry.rows, chunks, dtype=torch.int32, device=device)
    grid = (-(-chunks // _DRAWN_TOGETHER), 2 + geometry.rows)
    word = (seed + 2**63) % 2**64 - 2**63
    kernels.draw[grid](
        draws, word, first, chunks, geometry.width, geometry.tiles, lanes=_DRAWN_TOGETHER, enable_fp_fusion=False
    )
    return draws
