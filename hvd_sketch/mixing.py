"""Orthonormal transforms of the tensors of a layout, in which a few coefficients move whole blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout, Slot
from hvd_sketch.precision import full_precision

LARGEST = 64
"""Side of the largest block."""

_PIECE = 2**16


class _Side(NamedTuple):
    """Blocks of ``size`` along a dimension, so many of them, each of so many neighbours in memory."""

    blocks: int
    size: int
    behind: int


class Mixing:
    """An orthonormal transform T of the compressed tensors of a layout, block by block.

    A matrix, of a convolution ``(out, rest)``, is cut into blocks of ``(a, b)``, where a and b are the largest
    divisors of its two sides up to 64, for "hadamard" the largest powers of two among them; a vector into blocks of
    b. With orthonormal A and B a block X becomes::

        T(X) = A X B^T          T^-1(Y) = A^T Y B

        "dct"       A[k, n] = sqrt((1 + [k > 0]) / a) cos(pi k (2 n + 1) / (2 a))          DCT-II
        "hadamard"  A = H_2 x … x H_2, H_2 = [[1, 1], [1, -1]] / sqrt(2)                    in Sylvester's order

    Coefficients stand where the entries of their block stood, so tensors keep their places. A side without
    such a divisor is left as it is. Norms of blocks, and so of tensors, are those of the entries.

    "hadamard" adds and subtracts, and gives the same bits on every machine. "dct" multiplies matrices, and gives the
    same bits where PyTorch computes matrix products alike.

    Args:
        layout: the tensors; those that are sent whole stay as they are.
        kind: "dct" or "hadamard".

    Raises:
        ConfigurationError: for another kind.
    """

    def __init__(self, layout: Layout, kind: str) -> None:
        check_mixing(kind)
        self._divisor, self._along = _KINDS[kind]
        its = [self._sides_of(slot) if slot.stop <= layout.compressed else () for slot in layout.slots]
        self._sides = [[side for side in sides if side.size > 1] for sides in its]
        self._runs = [run for number in range(2) for run in _runs(layout.slots, its, number)]

    def mix(self, part: Tensor, position: int) -> None:
        """Replace a slot's entries (1-D, contiguous) by their coefficients."""
        for side in self._sides[position]:
            self._transform(part.view(side), inverse=False)

    def mix_all(self, vector: Tensor) -> None:
        """Replace the entries of all slots; one launch on a GPU for all neighbours of one shape."""
        for where, side in self._runs:
            self._transform(vector[where].view(side), inverse=False)

    def unmix_all(self, vector: Tensor) -> None:
        """Replace the coefficients of all slots."""
        for where, side in reversed(self._runs):
            self._transform(vector[where].view(side), inverse=True)

    def _transform(self, values: Tensor, *, inverse: bool) -> None:
        """Along the middle one of three dimensions, in place; a processor does it in pieces that its caches hold."""
        each = max(1, _PIECE // (values.shape[1] * values.shape[2])) if values.device.type == "cpu" else len(values)
        for piece in values.split(each):
            piece.copy_(self._along(piece, inverse).view_as(piece))

    def _sides_of(self, slot: Slot) -> tuple[_Side, ...]:
        """Two sides: of a tensor of several dimensions all others together, and the first one."""
        if slot.numel == 0:
            return ()
        rows = slot.shape[0] if len(slot.shape) > 1 else 1
        cols = slot.numel // rows
        sizes = self._divisor(cols), self._divisor(rows)
        return _Side(slot.numel // sizes[0], sizes[0], 1), _Side(rows // sizes[1], sizes[1], cols)


def _runs(slots: Sequence[Slot], sides: Sequence[tuple[_Side, ...]], number: int) -> Iterator[tuple[slice, _Side]]:
    """Stretches of the vector, each of slots that follow each other and are alike on that side."""
    where, whole = slice(0, 0), _Side(0, 1, 1)
    for slot, its in zip(slots, sides, strict=True):
        if not its or its[number].size == 1:
            continue
        side = its[number]
        if slot.offset == where.stop and side[1:] == whole[1:]:
            where, whole = slice(where.start, slot.stop), whole._replace(blocks=whole.blocks + side.blocks)
            continue
        if whole.blocks:
            yield where, whole
        where, whole = slice(slot.offset, slot.stop), side
    if whole.blocks:
        yield where, whole


def check_mixing(kind: str | None) -> None:
    """Refuse what is none.

    Raises:
        ConfigurationError: naming those that there are.
    """
    if kind is not None and kind not in _KINDS:
        raise ConfigurationError(f"mixing must be {', '.join(map(repr, _KINDS))} or None, got {kind!r}")


def largest_divisor(length: int) -> int:
    """Of a side, up to `LARGEST`: the side of its blocks."""
    return max((size for size in range(1, LARGEST + 1) if length % size == 0), default=1)


def _largest_power_of_two(length: int) -> int:
    return math.gcd(length, LARGEST)


@cache
def _cosines_on(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """Kept there: a copy from the host would wait for the device."""
    return cosines(size).to(device, dtype)


@cache
def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II of so many numbers, float64, a frequency a row."""
    numbers = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / size * numbers.unsqueeze(1) * (numbers + 0.5)) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def _cosine(values: Tensor, inverse: bool) -> Tensor:
    """The DCT along the middle one of three dimensions, or its inverse."""
    with torch.autocast(values.device.type, enabled=False), full_precision():
        matrix = _cosines_on(values.device, values.dtype, values.shape[1])
        if values.shape[2] == 1:
            return values.squeeze(2) @ (matrix if inverse else matrix.t())
        return torch.matmul(matrix.t() if inverse else matrix, values)


def _hadamard(values: Tensor, inverse: bool) -> Tensor:
    """The Hadamard transform along the middle one of three dimensions, which is its own inverse."""
    blocks, size, behind = values.shape
    width = 1
    while width < size:
        one, other = values.view(blocks, size // (2 * width), 2, width * behind).unbind(2)
        values = torch.empty_like(values)
        sums, differences = values.view(blocks, size // (2 * width), 2, width * behind).unbind(2)
        torch.add(one, other, out=sums)
        torch.sub(one, other, out=differences)
        width *= 2
    return values * (1.0 / math.sqrt(size))


_KINDS: dict[str, tuple[Callable[[int], int], Callable[[Tensor, bool], Tensor]]] = {
    "dct": (largest_divisor, _cosine),
    "hadamard": (_largest_power_of_two, _hadamard),
}
"""The size of a side's blocks, and the transform."""
