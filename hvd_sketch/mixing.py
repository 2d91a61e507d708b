"""Orthonormal transforms of the tensors of a layout, in which a few coefficients move whole blocks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_sketch import gpu, native
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


_Sides = tuple[_Side, ...]


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
        self._kind = _KINDS[kind]
        its = [self._sides_of(slot) if slot.stop <= layout.compressed else () for slot in layout.slots]
        self._sides = [tuple(side for side in sides if side.size > 1) for sides in its]
        passes = [self._sides]
        if self._kind.together is None:
            passes = [[tuple(side for side in sides[n : n + 1] if side.size > 1) for sides in its] for n in range(2)]
        self._runs = [run for sides in passes for run in _runs(layout.slots, sides)]

    def mix(self, part: Tensor, position: int) -> None:
        """Replace a slot's entries (1-D, contiguous) by their coefficients."""
        self._transform(part, self._sides[position], inverse=False)

    def mix_all(self, vector: Tensor) -> None:
        """Replace the entries of all slots; one launch on a GPU for all neighbours of one shape."""
        for where, sides in self._runs:
            self._transform(vector[where], sides, inverse=False)

    def unmix_all(self, vector: Tensor) -> None:
        """Replace the coefficients of all slots."""
        for where, sides in reversed(self._runs):
            self._transform(vector[where], sides, inverse=True)

    def _transform(self, values: Tensor, sides: Sequence[_Side], *, inverse: bool) -> None:
        """Along some sides of as many values, in place."""
        if self._kind.together is not None and sides and self._kind.together(values, sides, inverse):
            return
        for side in reversed(sides) if inverse else sides:
            _in_pieces(values.view(side), self._kind.along, inverse)

    def _sides_of(self, slot: Slot) -> tuple[_Side, ...]:
        """Two sides: of a tensor of several dimensions all others together, and the first one."""
        if slot.numel == 0:
            return ()
        rows = slot.shape[0] if len(slot.shape) > 1 else 1
        cols = slot.numel // rows
        sizes = self._kind.divisor(cols), self._kind.divisor(rows)
        return _Side(slot.numel // sizes[0], sizes[0], 1), _Side(rows // sizes[1], sizes[1], cols)


def _in_pieces(values: Tensor, along: Callable[[Tensor, bool], Tensor], inverse: bool) -> None:
    """Along the middle one of three dimensions, in place; a processor does it in pieces that its caches hold."""
    each = max(1, _PIECE // (values.shape[1] * values.shape[2])) if values.device.type == "cpu" else len(values)
    for piece in values.split(each):
        piece.copy_(along(piece, inverse).view_as(piece))


def _runs(slots: Sequence[Slot], all_sides: Sequence[_Sides]) -> Iterator[tuple[slice, _Sides]]:
    """Stretches of the vector, each of slots that follow each other and have sides that are alike."""
    where, whole = slice(0, 0), _Sides()
    for slot, sides in zip(slots, all_sides, strict=True):
        if not sides:
            continue
        if slot.offset == where.stop and [side[1:] for side in sides] == [side[1:] for side in whole]:
            where = slice(where.start, slot.stop)
            pairs = zip(whole, sides, strict=True)
            whole = tuple(before._replace(blocks=before.blocks + side.blocks) for before, side in pairs)
            continue
        if whole:
            yield where, whole
        where, whole = slice(slot.offset, slot.stop), sides
    if whole:
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


def _hadamard_together(values: Tensor, sides: Sequence[_Side], inverse: bool) -> bool:
    """Both sides by one kernel, if there is one for these values; the same bits as one side after the other."""
    along = next((side.size for side in sides if side.behind == 1), 1)
    down, behind = next((side[1:] for side in sides if side.behind > 1), (1, values.numel()))
    if native.serves_floats(values):
        native.library().hadamard_transform(
            values.data_ptr(), values.numel(), along, down, behind, inverse, torch.get_num_threads()
        )
    elif values.dtype == torch.float32 and values.is_contiguous() and gpu.serves(values):
        on_gpu = importlib.import_module("hvd_sketch.mixing_cuda")  # with Triton
        on_gpu.transform(values, along, down, behind, inverse=inverse)
    else:
        return False
    return True


class _Kind(NamedTuple):
    """A transform: the size of a side's blocks, along one side, and of all sides in place, where there is a kernel."""

    divisor: Callable[[int], int]
    along: Callable[[Tensor, bool], Tensor]
    together: Callable[[Tensor, Sequence[_Side], bool], bool] | None = None


_KINDS = {
    "dct": _Kind(largest_divisor, _cosine),
    "hadamard": _Kind(_largest_power_of_two, _hadamard, _hadamard_together),
}
