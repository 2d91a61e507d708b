"""All gradients of a step into one vector by one kernel, with the sum of their squares."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.gpu import Addresses, Places, pieces_of

_PIECE = 1 << 14
_LANES = 1024
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Gathering:
    """Copies gradients of slots to their places, and sums the squares of each piece of them.

    Args:
        places: where each slot starts and stops in the vector.
        vector: float32.
    """

    def __init__(self, places: Places, vector: Tensor) -> None:
        self._vector = vector
        pieces = pieces_of(places, _PIECE)
        self._first = [bisect_left(pieces, (slot, 0, 0, 0)) for slot in range(len(places) + 1)]
        self._pieces = torch.tensor(pieces, dtype=torch.int64, device=vector.device).view(-1, 4)
        self._squares = torch.zeros(len(pieces), dtype=torch.float64, device=vector.device)
        self._addresses = Addresses(vector.device)

    @staticmethod
    def serves(gradient: Tensor, vector: Tensor) -> bool:
        """Whether a gradient can be read from where it lies."""
        return gradient.dtype in _DTYPES and gradient.is_contiguous() and gradient.device == vector.device

    def __call__(self, gradients: Mapping[int, Tensor], factor: float) -> None:
        """Copy them, by the position of their slot, times a factor."""
        for kind in {gradient.dtype for gradient in gradients.values()}:
            table = self._table(kind, gradients)
            with torch.cuda.device_of(self._vector):
                gather[len(self._pieces),](
                    self._vector,
                    table,
                    self._pieces,
                    self._squares,
                    factor,
                    kind=_DTYPES[kind],
                    piece=_PIECE,
                    lanes=_LANES,
                )

    def squares(self, slots: slice) -> Tensor:
        """The sum of the squares of these slots, float64."""
        first, last, _ = slots.indices(len(self._first) - 1)
        return self._squares[self._first[first] : self._first[last]].sum()

    def measure(self, limit: float | None) -> tuple[Tensor, Tensor]:
        """See `Staging.measure`."""
        numbers = torch.empty(2, dtype=torch.float32, device=self._vector.device)
        with torch.cuda.device_of(self._vector):
            conclude[1,](
                numbers,
                self._squares,
                len(self._squares),
                math.inf if limit is None else limit,
                lanes=_LANES,
                enable_fp_fusion=False,
            )
        return numbers[0], numbers[1]

    def clear(self, slot: int) -> None:
        """Count the slot as zeros."""
        self._squares[self._first[slot] : self._first[slot + 1]].zero_()

    def _table(self, kind: torch.dtype, gradients: Mapping[int, Tensor]) -> Tensor:
        """Where the gradients of a dtype lie, 0 for slots without one."""
        addresses = [0] * (len(self._first) - 1)
        for slot, gradient in gradients.items():
            addresses[slot] = gradient.data_ptr() if gradient.dtype == kind else 0
        return self._addresses(kind, addresses)


@triton.jit
def gather(
    vector: tl.tensor,
    pointers: tl.tensor,
    pieces: tl.tensor,
    squares: tl.tensor,
    factor: tl.float32,
    kind: tl.constexpr,
    piece: tl.constexpr,
    lanes: tl.constexpr,
):
    """Copy a piece, if its slot has a gradient, and store the sum of its squares. Grid: pieces."""
    program = tl.program_id(0).to(tl.int64)
    slot, offset = tl.load(pieces + 4 * program), tl.load(pieces + 4 * program + 1)
    start, stop = tl.load(pieces + 4 * program + 2), tl.load(pieces + 4 * program + 3)
    address = tl.load(pointers + slot)
    if address != 0:
        source = address.to(tl.pointer_type(kind)) + offset
        total = tl.zeros((lanes,), tl.float64)
        count = (stop - start).to(tl.int32)
        for first in tl.range(0, piece, lanes):
            at = first + tl.arange(0, lanes)
            inside = at < count
            value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(vector + start + at, value, mask=inside)
            wide = value.to(tl.float64)
            total += wide * wide
        tl.store(squares + program, tl.sum(total))


@triton.jit(do_not_specialize=["count", "limit"])
def conclude(numbers: tl.tensor, squares: tl.tensor, count: tl.int64, limit: tl.float32, lanes: tl.constexpr):
    """From the sums of squares: the factor of the gradient, and 0 times its norm. Grid: 1."""
    total = tl.zeros((lanes,), tl.float64)
    for first in range(0, count, lanes):
        at = first + tl.arange(0, lanes)
        total += tl.load(squares + at, mask=at < count, other=0.0)
    norm = tl.sqrt(tl.sum(total)).to(tl.float32)
    most = tl.full((), limit, tl.float32)
    tl.store(numbers, tl.where(norm > most, tl.div_rn(most, norm), 1.0))
    tl.store(numbers + 1, norm * 0.0)
