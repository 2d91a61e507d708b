"""Where `Anticipate` takes the gradient, for all parameters by one kernel, with no vector but the model's copy."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.gpu import Addresses, Places, pieces_of

_PIECE = 1 << 14
_LANES = 1024
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Mover:
    """Moves parameters by how far their unsent gradients will, and keeps what they were.

    Args:
        parameters: in the order of the vector.
        places: where each starts and stops in it.
    """

    def __init__(self, parameters: Sequence[Tensor], places: Places) -> None:
        self._parameters, device = list(parameters), parameters[0].device
        self._pieces = torch.tensor(pieces_of(places, _PIECE), dtype=torch.int64, device=device).view(-1, 4)
        self._addresses = Addresses(device)

    @staticmethod
    def serves(parameters: Sequence[Tensor], moments: Sequence[Tensor | None]) -> bool:
        """Whether it can read and write these."""
        known = all(moment is None or moment.dtype == torch.float32 for moment in moments)
        dense = all(each is None or each.is_contiguous() for each in (*parameters, *moments))
        return known and dense and all(parameter.dtype in _DTYPES for parameter in parameters)

    def __call__(
        self,
        errors: Tensor,
        owned: slice,
        shares: Tensor,
        moments: Sequence[Tensor | None],
        numbers: Sequence[tuple[float, ...]],
        kept: Tensor,
    ) -> None:
        """Copy the parameters to ``kept``, and move each by P of its errors.

        Args:
            errors: the unsent gradients, all in one vector.
            owned: of these so many times too large.
            shares: a factor for each parameter's errors.
            moments: each one's second moments, None where P is linear.
            numbers: of each ``lr, 1 - b2, 1 / sqrt(1 - b2^t), eps``, the first as P has it.
            kept: float32, of the errors' size.
        """
        device = errors.device
        table = torch.tensor(numbers, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
        table = table.to(device, non_blocking=True)
        seconds = self._addresses("moments", [0 if moment is None else moment.data_ptr() for moment in moments])
        for kind in {parameter.dtype for parameter in self._parameters}:
            addresses = [p.data_ptr() if p.dtype == kind else 0 for p in self._parameters]
            with torch.cuda.device_of(errors):
                move[len(self._pieces),](
                    self._addresses(kind, addresses),
                    seconds,
                    errors,
                    shares,
                    table,
                    self._pieces,
                    kept,
                    owned.start or 0,
                    owned.stop,
                    owned.step or 1,
                    kind=_DTYPES[kind],
                    piece=_PIECE,
                    lanes=_LANES,
                )


@triton.jit(do_not_specialize=["first", "last", "ranks"])
def move(
    parameters: tl.tensor,
    moments: tl.tensor,
    errors: tl.tensor,
    shares: tl.tensor,
    numbers: tl.tensor,
    pieces: tl.tensor,
    kept: tl.tensor,
    first: tl.int64,
    last: tl.int64,
    ranks: tl.int64,
    kind: tl.constexpr,
    piece: tl.constexpr,
    lanes: tl.constexpr,
):
    """Keep and move a piece of a parameter, if it is of this dtype. Grid: pieces."""
    program = tl.program_id(0).to(tl.int64)
    slot, offset = tl.load(pieces + 4 * program), tl.load(pieces + 4 * program + 1)
    start, stop = tl.load(pieces + 4 * program + 2), tl.load(pieces + 4 * program + 3)
    address, second = tl.load(parameters + slot), tl.load(moments + slot)
    if address != 0:
        parameter = address.to(tl.pointer_type(kind)) + offset
        moment = second.to(tl.pointer_type(tl.float32)) + offset
        share = tl.load(shares + slot)
        rate, weight = tl.load(numbers + 4 * slot), tl.load(numbers + 4 * slot + 1)
        scale, least = tl.load(numbers + 4 * slot + 2), tl.load(numbers + 4 * slot + 3)
        for begin in tl.range(0, piece, lanes):
            at = begin + tl.arange(0, lanes)
            inside = at < (stop - start).to(tl.int32)
            error = tl.load(errors + start + at, mask=inside, other=0.0)
            place = start + at
            its = (place < last) & (place % ranks == first)
            error = tl.where(its, tl.div_rn(error, tl.zeros_like(error) + ranks), error) * share
            if second != 0:
                size = tl.load(moment + at, mask=inside, other=0.0) + weight * error * error
                error = tl.div_rn(error, tl.sqrt_rn(size) * scale + least)
            value = tl.load(parameter + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(kept + start + at, value, mask=inside)
            tl.store(parameter + at, (value - rate * error).to(kind), mask=inside)
