"""The GPU kernels of `hvd_sketch.sketch.narrow`: a warp for each slice, and one for each stretch to add them up."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.sketch.cuda_kernels import _below, _drawn, _flip

_SIGN_STREAM = 1 << 20


def sketch(vector: Tensor, draw: tuple[int, float], places: Tensor, edges: Tensor, size: int, cells: int) -> Tensor:
    """The tables of all stretches; see `NarrowSketches`.

    ``places``, int64 of shape ``(slices, 3)``: where each slice starts, where its stretch stops, and its number in the
    stretch; ``edges``: the first slice of each stretch, and behind them the number of slices; ``draw``: the seed and
    the scale; ``size``: coordinates of a slice; ``cells`` of a table.
    """
    seed, scale = draw
    parts = torch.empty(len(places), cells, dtype=torch.float32, device=vector.device)
    tables = torch.empty(len(edges) - 1, cells, dtype=torch.float32, device=vector.device)
    word = (seed + 2**63) % 2**64 - 2**63
    with torch.cuda.device_of(vector):
        add_slices[len(places),](
            parts,
            vector,
            places,
            word,
            scale,
            size=size,
            cells=cells,
            sign_stream=_SIGN_STREAM,
            num_warps=1,
            enable_fp_fusion=False,
        )
        add_up[len(edges) - 1,](tables, parts, edges, cells=cells, num_warps=1, enable_fp_fusion=False)
    return tables


@triton.jit(do_not_specialize=["seed"])
def add_slices(
    parts: tl.tensor,
    vector: tl.tensor,
    places: tl.tensor,
    seed: tl.int64,
    scale: tl.float32,
    size: tl.constexpr,
    cells: tl.constexpr,
    sign_stream: tl.constexpr,
):
    """The table of one slice. Grid: slices."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(places + 3 * program), tl.load(places + 3 * program + 1)
    chunk = tl.load(places + 3 * program + 2) * (size // cells)
    count = tl.minimum(stop - start, size).to(tl.int32)
    cell = tl.arange(0, cells)
    sums = tl.zeros((cells,), tl.float32)
    for first in tl.range(0, count, cells, loop_unroll_factor=8):
        offset = _below(_drawn(seed, chunk * 0, chunk), chunk * 0 + cells).to(tl.int32)
        key = _drawn(seed, chunk * 0 + sign_stream, chunk).to(tl.int64).to(tl.int32)
        position = (cell - offset) & (cells - 1)
        used = first + position < count
        value = tl.load(vector + start + first + position, mask=used, other=0.0).to(tl.float32) * scale
        sums = tl.where(used, sums + _flip(value, key, position, tl.full((), 0, tl.int32)), sums)
        chunk += 1
    tl.store(parts + program * cells + cell, sums)


@triton.jit
def add_up(tables: tl.tensor, parts: tl.tensor, edges: tl.tensor, cells: tl.constexpr):
    """Add a stretch's slices in their order. Grid: stretches."""
    program = tl.program_id(0).to(tl.int64)
    first, last = tl.load(edges + program), tl.load(edges + program + 1)
    cell = tl.arange(0, cells)
    sums = tl.load(parts + first * cells + cell)
    for number in tl.range(first + 1, last, loop_unroll_factor=8):
        sums += tl.load(parts + number * cells + cell)
    tl.store(tables + program * cells + cell, sums)
