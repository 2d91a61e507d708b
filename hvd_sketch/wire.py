"""How floats travel: full precision, or half precision with a shared power-of-two scale."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HEADER = 4
"""Lanes before the payload, each a sum over the ranks: those that lack a gradient (NaN where one is not finite), those
that take part, those with a problem, those that want to flush."""

_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The constants of splitmix64 (Steele, Lea and Flood 2014), as int64."""

DIGEST_BITS = 32
_HALF_LIMIT = 32768.0
_HEADROOM = 8.0
_LARGEST_EXPONENT = 126
"""Of a scale: it and its inverse are normal float32 numbers, however small the values are."""


class Header(NamedTuple):
    """What the ranks' headers say in sum.

    Attributes:
        finite: whether every rank's gradient is.
        incomplete: whether some rank has no gradient for some parameter.
        present: how many ranks took part.
        problem: whether some rank has a problem.
        flush: whether some rank asks for a flush.
    """

    finite: bool
    incomplete: bool
    present: int
    problem: bool
    flush: bool

    @classmethod
    def of(cls, lanes: Sequence[float]) -> Header:
        """From the values of the summed lanes."""
        return cls(not math.isnan(lanes[0]), lanes[0] > 0.0, int(lanes[1]), lanes[2] > 0.0, lanes[3] > 0.0)

    @property
    def void(self) -> bool:
        """Whether nothing of what the step selected will be applied."""
        return not self.finite or self.problem or self.flush


def shared_scale(largest: float, ranks: int, dtype: torch.dtype) -> float:
    """A power of two that puts a sum of ``ranks`` values of mean size ``largest`` into range.

    Float32 needs none. In half precision the sum may still grow eightfold before it is clamped.
    ``largest`` must be the same number on every rank, so it comes from something reduced.
    """
    if dtype != torch.float16 or not 0.0 < largest < math.inf:
        return 1.0
    return 2.0 ** min(_LARGEST_EXPONENT, math.floor(math.log2(_HALF_LIMIT / (_HEADROOM * ranks * largest))))


def pack(lanes: Tensor, values: Tensor, scale: float, ranks: int) -> None:
    """Write ``scale * values`` to the wire's lanes, clamped so that no sum of ranks can overflow.

    Half precision works in place: ``values`` are then scaled and clamped themselves.
    """
    if lanes.dtype == torch.float16:
        limit = _HALF_LIMIT / ranks
        values.mul_(scale).clamp_(-limit, limit)
    lanes.copy_(values)


def unpack(lanes: Tensor, scale: float, values: Tensor) -> Tensor:
    """Write the float32 values behind the lanes to ``values`` and return it."""
    values.copy_(lanes)
    return values if scale == 1.0 else values.mul_(1.0 / scale)


def write_header(
    message: Tensor, finite: bool | Tensor, *, incomplete: bool = False, problem: bool = False, flush: bool = False
) -> None:
    """Mark this rank present, and what there is to say of it; see `Header`.

    Whether its gradient is finite may be told by a number of the message's device: 0 if so, else NaN.
    """
    told = isinstance(finite, Tensor)
    message[:HEADER].copy_(_lanes(message.device, told or bool(finite), incomplete, problem, flush))
    if isinstance(finite, Tensor):
        message[:1].add_(finite)


@functools.cache
def _lanes(device: torch.device, finite: bool, incomplete: bool, problem: bool, flush: bool) -> Tensor:
    """Kept on its device, for numbers that come from the host would wait for it."""
    return torch.tensor(
        [incomplete if finite else math.nan, 1.0, float(problem), float(flush)], dtype=torch.float32, device=device
    )


def read_header(message: Tensor) -> Header:
    """What a summed message's header tells; waits for a device that has yet to compute it."""
    return Header.of(message[:HEADER].tolist())


def write_digest(lanes: Tensor, content: Tensor, salt: int = 0) -> None:
    """One lane a bit of a checksum of integers or of float32 values: sums tell whether all ranks agree.

    ``salt``, from 0 to 2^32 - 1, is a number to agree on as well.
    """
    mixed = (content.view(torch.int32) if content.is_floating_point() else content).to(torch.int64)
    mixed = torch.arange(1, mixed.numel() + 1, device=mixed.device).mul_(_ODD[0]).add_(mixed)
    for odd in _ODD[1:]:
        mixed.bitwise_xor_(mixed >> 31).mul_(odd)  # the finalizer of splitmix64, nearly
    checksum = mixed.sum() ^ salt
    lanes.copy_((checksum ^ (checksum >> 32)) >> torch.arange(DIGEST_BITS, device=mixed.device) & 1)


def digests_agree(lanes: Tensor, contributors: Tensor) -> Tensor:
    """Whether each bit was set by none or by all of the contributing ranks."""
    return ((lanes == 0) | (lanes == contributors)).all()
