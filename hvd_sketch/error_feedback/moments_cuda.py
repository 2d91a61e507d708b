"""The measurements of `FactoredMoments` for all parameters at once, and lending them to Adam, in a few launches."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.gpu import Addresses, Places, pieces_of

_PIECE = 1 << 14
_LANES = 1024
_ROWS, _COLUMNS = 8, 128
"""Of which a program adds up the squares."""
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Moments:
    """Matrices that are stretches of a vector, and factors of each: numbers for its rows, then for its columns.

    Args:
        places: where each matrix starts and stops.
        rows: of each, dividing its size.
        device: of the vector.
    """

    def __init__(self, places: Places, rows: Sequence[int], device: torch.device) -> None:
        shapes = [(number, (stop - start) // number) for (start, stop), number in zip(places, rows, strict=True)]
        first = 0
        matrices, by_rows, by_columns = [], [], []
        for matrix, ((start, _), (height, width)) in enumerate(zip(places, shapes, strict=True)):
            matrices.append((start, height, width, first))
            by_rows += [(matrix, at) for at in range(0, height, _ROWS)]
            by_columns += [(matrix, at) for at in range(0, width, _COLUMNS)]
            first += height + width
        self._matrices, self._by_rows, self._by_columns, self._pieces = (
            torch.tensor(table, dtype=torch.int64, device=device).view(len(table), -1)
            for table in (matrices, by_rows, by_columns, pieces_of(places, _PIECE))
        )
        self._device, self._addresses = device, Addresses(device)

    def sum_squares(self, vector: Tensor, scale: float, factors: Tensor) -> None:
        """Set the factors to the sums of the squares of ``scale * vector`` in each row and column."""
        with torch.cuda.device_of(vector):
            for kernel, table in ((sum_rows, self._by_rows), (sum_columns, self._by_columns)):
                kernel[len(table),](
                    factors, vector, self._matrices, table, scale, rows=_ROWS, columns=_COLUMNS, enable_fp_fusion=False
                )

    def spread(self, energies: Tensor, factors: Tensor, vector: Tensor) -> None:
        """Set each matrix to ``energy * row * column / (sum of rows * sum of columns)``."""
        scales = torch.empty_like(energies)
        with torch.cuda.device_of(vector):
            scale_of[len(self._matrices),](scales, energies, factors, self._matrices, lanes=_LANES)
            spread[len(self._pieces),](
                vector, scales, factors, self._matrices, self._pieces, piece=_PIECE, lanes=_LANES
            )

    def lend(
        self,
        vector: Tensor,
        means: Mapping[Tensor, Tensor],
        numbers: Mapping[Tensor, tuple[float, float]],
        parameters: Sequence[Tensor],
    ) -> None:
        """Set means to ``a v - b u^2``, and no less than 0, for the gradient u of their parameter.

        Args:
            vector: v of all matrices.
            means: float32, contiguous, by parameter.
            numbers: a and b of each.
            parameters: those of the matrices, in their order.
        """
        to = self._addresses("means", [means[p].data_ptr() if p in means else 0 for p in parameters])
        pairs = [numbers.get(parameter, (0.0, 0.0)) for parameter in parameters]
        table = torch.tensor(pairs, dtype=torch.float32, device="cpu", pin_memory=self._device.type == "cuda")
        table = table.to(self._device, non_blocking=True)
        for kind in {parameter.grad.dtype for parameter in means}:
            addresses = [p.grad.data_ptr() if p in means and p.grad.dtype == kind else 0 for p in parameters]
            with torch.cuda.device_of(vector):
                lend[len(self._pieces),](
                    to,
                    self._addresses(kind, addresses),
                    vector,
                    table,
                    self._pieces,
                    kind=_DTYPES[kind],
                    piece=_PIECE,
                    lanes=_LANES,
                )

    @staticmethod
    def serves(means: Mapping[Tensor, Tensor]) -> bool:
        """Whether it can lend to these, by their parameters."""
        sizes = all(mean.dtype == torch.float32 and mean.is_contiguous() for mean in means.values())
        return sizes and all(each.grad.dtype in _DTYPES and each.grad.is_contiguous() for each in means)


@triton.jit
def _square(vector, at, inside, scale):
    value = tl.load(vector + at, mask=inside, other=0.0) * scale
    return value * value


@triton.jit
def sum_rows(
    factors: tl.tensor,
    vector: tl.tensor,
    matrices: tl.tensor,
    table: tl.tensor,
    scale: tl.float32,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Of some rows of a matrix. Grid: lines of the table, matrix and first row."""
    program = tl.program_id(0).to(tl.int64)
    matrix, row = tl.load(table + 2 * program), tl.load(table + 2 * program + 1) + tl.arange(0, rows)
    start, height = tl.load(matrices + 4 * matrix), tl.load(matrices + 4 * matrix + 1)
    width, to = tl.load(matrices + 4 * matrix + 2), tl.load(matrices + 4 * matrix + 3)
    total = tl.zeros((rows, columns), tl.float32)
    for first in range(0, width, columns):
        column = first + tl.arange(0, columns)
        inside = (row < height)[:, None] & (column < width)[None, :]
        total += _square(vector, start + row[:, None] * width + column[None, :], inside, scale)
    tl.store(factors + to + row, tl.sum(total, axis=1), mask=row < height)


@triton.jit
def sum_columns(
    factors: tl.tensor,
    vector: tl.tensor,
    matrices: tl.tensor,
    table: tl.tensor,
    scale: tl.float32,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Of some columns of a matrix. Grid: lines of the table, matrix and first column."""
    program = tl.program_id(0).to(tl.int64)
    matrix, column = tl.load(table + 2 * program), tl.load(table + 2 * program + 1) + tl.arange(0, columns)
    start, height = tl.load(matrices + 4 * matrix), tl.load(matrices + 4 * matrix + 1)
    width, to = tl.load(matrices + 4 * matrix + 2), tl.load(matrices + 4 * matrix + 3)
    total = tl.zeros((rows, columns), tl.float32)
    for first in range(0, height, rows):
        row = first + tl.arange(0, rows)
        inside = (row < height)[:, None] & (column < width)[None, :]
        total += _square(vector, start + row[:, None] * width + column[None, :], inside, scale)
    tl.store(factors + to + height + column, tl.sum(total, axis=0), mask=column < width)


@triton.jit
def _total(values, count, lanes: tl.constexpr):
    total = tl.zeros((lanes,), tl.float32)
    for first in range(0, count, lanes):
        at = first + tl.arange(0, lanes)
        total += tl.load(values + at, mask=at < count, other=0.0)
    return tl.sum(total)


@triton.jit
def scale_of(scales: tl.tensor, energies: tl.tensor, factors: tl.tensor, matrices: tl.tensor, lanes: tl.constexpr):
    """By what the product of a row's and a column's number is multiplied. Grid: matrices."""
    matrix = tl.program_id(0).to(tl.int64)
    height, width = tl.load(matrices + 4 * matrix + 1), tl.load(matrices + 4 * matrix + 2)
    first = factors + tl.load(matrices + 4 * matrix + 3)
    product = _total(first, height, lanes) * _total(first + height, width, lanes)
    tl.store(scales + matrix, tl.div_rn(tl.load(energies + matrix), tl.maximum(product, 1.1754943508222875e-38)))


@triton.jit
def spread(
    vector: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    matrices: tl.tensor,
    pieces: tl.tensor,
    piece: tl.constexpr,
    lanes: tl.constexpr,
):
    """Grid: pieces."""
    program = tl.program_id(0).to(tl.int64)
    matrix, offset = tl.load(pieces + 4 * program), tl.load(pieces + 4 * program + 1)
    start, stop = tl.load(pieces + 4 * program + 2), tl.load(pieces + 4 * program + 3)
    height, width = tl.load(matrices + 4 * matrix + 1), tl.load(matrices + 4 * matrix + 2)
    first = factors + tl.load(matrices + 4 * matrix + 3)
    scale = tl.load(scales + matrix)
    for begin in tl.range(0, piece, lanes):
        at = begin + tl.arange(0, lanes)
        inside = at < (stop - start).to(tl.int32)
        place = offset + at
        row = tl.load(first + place // width, mask=inside, other=0.0)
        column = tl.load(first + height + place % width, mask=inside, other=0.0)
        tl.store(vector + start + at, row * scale * column, mask=inside)


@triton.jit
def lend(
    means: tl.tensor,
    updates: tl.tensor,
    vector: tl.tensor,
    numbers: tl.tensor,
    pieces: tl.tensor,
    kind: tl.constexpr,
    piece: tl.constexpr,
    lanes: tl.constexpr,
):
    """Grid: pieces."""
    program = tl.program_id(0).to(tl.int64)
    matrix, offset = tl.load(pieces + 4 * program), tl.load(pieces + 4 * program + 1)
    start, stop = tl.load(pieces + 4 * program + 2), tl.load(pieces + 4 * program + 3)
    mean, update = tl.load(means + matrix), tl.load(updates + matrix)
    if (mean != 0) & (update != 0):
        to = mean.to(tl.pointer_type(tl.float32)) + offset
        its = update.to(tl.pointer_type(kind)) + offset
        whole, less = tl.load(numbers + 2 * matrix), tl.load(numbers + 2 * matrix + 1)
        for begin in tl.range(0, piece, lanes):
            at = begin + tl.arange(0, lanes)
            inside = at < (stop - start).to(tl.int32)
            size = tl.load(its + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(vector + start + at, mask=inside, other=0.0) * whole - less * size * size
            tl.store(to + at, tl.maximum(value, 0.0), mask=inside)
