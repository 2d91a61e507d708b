"""The GPU kernels of `hvd_sketch.sketch.narrow`: a warp for each slice, and one for each stretch to add them up."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.sketch.cuda_kernels import _below, _drawn, _flip


class NarrowKernels:
    """The tables of all stretches; see `hvd_sketch.sketch.narrow.NarrowSketches`.

    Args:
        places: int64 ``(slices, 3)``: where each slice starts, where its stretch stops, its number in the stretch.
        edges: int64: the first slice of each stretch, and behind them the number of slices.
        size: coordinates of a slice.
        cells: of a table.
    """

    def __init__(self, places: Tensor, edges: Tensor, size: int, cells: int) -> None:
        self._places, self._edges, self._size, self._cells = places, edges, size, cells

    def tables(self, vector: Tensor, seed: int, scale: float) -> Tensor:
        """Of ``scale * vector``."""
        return self._sums(vector, seed, scale, slice(0), energies=False)[0]

    def measure(self, vector: Tensor, seed: int, owned: slice) -> tuple[Tensor, Tensor]:
        """The same, and the sum of the squares of each; the values that are owned are ``owned.step`` too large."""
        tables, energies = self._sums(vector, seed, 1.0, owned, energies=True)
        return tables, energies.sum(dim=1)

    def _sums(self, vector: Tensor, seed: int, scale: float, owned: slice, *, energies: bool) -> Tensor:
        slices, stretches, cells = len(self._places), len(self._edges) - 1, self._cells
        parts = torch.empty(2, slices, cells, dtype=torch.float32, device=vector.device)
        sums = torch.empty(2, stretches, cells, dtype=torch.float32, device=vector.device)
        word = (seed + 2**63) % 2**64 - 2**63
        with torch.cuda.device_of(vector):
            add_slices[slices,](
                *parts,
                vector,
                self._places,
                word,
                scale,
                owned.start or 0,
                owned.stop,
                owned.step or 1,
                1.0 / (owned.step or 1),
                size=self._size,
                cells=cells,
                energies=energies,
                num_warps=1,
                enable_fp_fusion=False,
            )
            for its_sums, its_parts in zip(sums, parts if energies else parts[:1], strict=False):
                add_up[stretches,](its_sums, its_parts, self._edges, cells=cells, num_warps=1, enable_fp_fusion=False)
        return sums


@triton.jit(do_not_specialize=["seed", "first_owned", "last_owned", "ranks"])
def add_slices(
    parts: tl.tensor,
    squares: tl.tensor,
    vector: tl.tensor,
    places: tl.tensor,
    seed: tl.int64,
    scale: tl.float32,
    first_owned: tl.int64,
    last_owned: tl.int64,
    ranks: tl.int64,
    share: tl.float32,
    size: tl.constexpr,
    cells: tl.constexpr,
    energies: tl.constexpr,
):
    """The table of one slice, and with ``energies`` sums of squares to be added up. Grid: slices."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(places + 3 * program), tl.load(places + 3 * program + 1)
    chunk = tl.load(places + 3 * program + 2) * (size // cells)
    count = tl.minimum(stop - start, size).to(tl.int32)
    cell = tl.arange(0, cells)
    sums, energy = tl.zeros((cells,), tl.float32), tl.zeros((cells,), tl.float32)
    turn = ((start - first_owned) % ranks).to(tl.int32)  # the owner's next coordinate is where it comes to 0
    owned = tl.minimum(tl.maximum(last_owned - start, 0), size).to(tl.int32)
    for first in tl.range(0, count, cells, loop_unroll_factor=8):
        key = _drawn(seed, chunk * 0, chunk).to(tl.int32)
        offset = _below(_drawn(seed, chunk * 0 + 1, chunk), cells).to(tl.int32)
        position = (cell - offset) & (cells - 1)
        used = first + position < count
        value = tl.load(vector + start + first + position, mask=used, other=0.0).to(tl.float32) * scale
        sums = tl.where(
            used, sums + _flip(value, key, position // 64, position % 64, tl.full((), 0, tl.int32), 1), sums
        )
        if energies:
            its = first + position
            value = tl.where((its < owned) & ((turn + its) % ranks.to(tl.int32) == 0), value * share, value)
            energy += value * value
        chunk += 1
    tl.store(parts + program * cells + cell, sums)
    if energies:
        tl.store(squares + program * cells + cell, energy)


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
