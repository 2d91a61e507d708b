"""How floats travel: full precision, or half precision with a shared power-of-two scale."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_sketch.bits import pack as pack_bits
from hvd_sketch.bits import packed_bytes
from hvd_sketch.bits import unpack as unpack_bits
from hvd_sketch.comm.copies import COPIES, majority

_TOLD = 5
"""Numbers of a header, each a sum over the ranks: those that lack a gradient, those where one is not finite, those
that take part, those with a problem, those that want to flush."""

DIGEST_BITS = 32

DIGEST = slice(COPIES * _TOLD, COPIES * _TOLD + DIGEST_BITS)
"""Lanes of a header that tell in sum whether the ranks agree; see `write_digest`."""

HEADER = DIGEST.stop
"""Lanes before the payload."""

MOST_PACKED = 255
"""Ranks for which a packed header can speak."""

_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The constants of splitmix64 (Steele, Lea and Flood 2014), as int64."""

_MARK = 0x5A17C0DE
"""In every checksum, so that a row of zeros has another one than zero."""

_SUMS = 64
_HALF_LIMIT = 32768.0
_HEADROOM = 8.0
_LARGEST_EXPONENT = 126
"""Of a scale: it and its inverse are normal float32 numbers, however small the values are."""


class Header(NamedTuple):
    """What the ranks' headers say in sum.

    Attributes:
        finite: whether every rank's gradient is.
        incomplete: whether some rank has no gradient for some parameter.
        present: how many ranks took part; a half of one where a header speaks for several.
        problem: whether some rank has a problem.
        flush: whether some rank asks for a flush.
        agreed: whether the ranks wrote the same digest.
    """

    finite: bool
    incomplete: bool
    present: float
    problem: bool
    flush: bool
    agreed: bool

    @classmethod
    def of(cls, lanes: Sequence[float]) -> Header:
        """From the values of the summed lanes."""
        incomplete, odd, present, problem, flush = majority(lanes[: DIGEST.start])
        agreed = digests_agree(lanes[DIGEST], present)
        return cls(odd == 0.0, incomplete > 0.0, present, problem > 0.0, flush > 0.0, agreed)

    @property
    def void(self) -> bool:
        """Whether nothing of what the step selected will be applied."""
        return not (self.finite and self.agreed) or self.problem or self.flush

    def regular(self, ranks: int) -> bool:
        """Whether all ranks take part, and none lacks a gradient."""
        return self.present == ranks and not self.incomplete


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
    message: Tensor,
    finite: bool | Tensor = True,
    *,
    incomplete: bool = False,
    problem: bool | Tensor = False,
    flush: bool = False,
) -> None:
    """Mark this rank present, and what there is to say of it; see `Header`. The digest is left to be written.

    Whether its gradient is finite may be told by a number of the message's device: 0 if so, else NaN; and whether
    there is a problem by a bool of it.
    """
    told = isinstance(finite, Tensor) or bool(finite)
    known = problem is True
    lanes = message[: DIGEST.start]
    lanes.copy_(_lanes(message.device, (incomplete, not told, True, known, flush)))
    if isinstance(finite, Tensor):
        lanes[1::_TOLD].add_(finite.isnan())
    if isinstance(problem, Tensor):
        lanes[3::_TOLD].add_(problem.to(lanes.device))  # of hosts, the header is not where messages are


@functools.cache
def _lanes(device: torch.device, told: tuple[bool, ...]) -> Tensor:
    """Kept on its device, for numbers that come from the host would wait for it."""
    return torch.tensor(told * COPIES, dtype=torch.float32, device=device)


def read_header(message: Tensor) -> Header:
    """What a summed message's header tells; waits for a device that has yet to compute it."""
    return Header.of(message[:HEADER].tolist())


def header_bytes(ranks: int = 1) -> int:
    """Bytes of a header that is not summed on its way; see `pack_header`."""
    return packed_bytes(HEADER, _lane_bits(ranks))


def pack_header(message: Tensor, ranks: int = 1) -> Tensor:
    """A message's header as bytes (uint8), in few bits a lane: one for a rank's own, more for a mean of some."""
    packed = torch.empty(header_bytes(ranks), dtype=torch.uint8, device=message.device)
    counts = (message[:HEADER] * ranks).round_().to(torch.uint8)
    pack_bits(counts.view(torch.int8), _lane_bits(ranks), packed)
    return packed


def read_packed_headers(rows: Tensor, ranks: int = 1) -> Header:
    """What headers say in sum, each packed in a row; waits for a device."""
    bits = _lane_bits(ranks)
    counts = torch.empty(len(rows), HEADER, dtype=torch.float32, device=rows.device)
    unpack_bits(rows, bits, counts)
    return Header.of(torch.where(counts < 0.0, counts + 2**bits, counts).sum(0).div_(ranks).tolist())


def _lane_bits(ranks: int) -> int:
    """Of a count of up to so many ranks."""
    return next(bits for bits in (1, 2, 4, 8) if ranks < 2**bits)


def tells_of_odd(message: Tensor) -> bool:
    """Whether a header, not yet summed, says that a gradient is not finite."""
    return bool(message[1] > 0.0)


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


def digests_agree(lanes: Sequence[float], contributors: float) -> bool:
    """Whether each bit was set by none or by all of the contributing ranks.

    One lane may be otherwise: ranks that differ, differ in about half of them, so that is a lane damaged on its way
    to this rank, which must not take another way than the others.
    """
    return sum(lane not in (0.0, contributors) for lane in lanes) <= 1


def words(content: Tensor) -> Tensor:
    """The bits of any tensor as a vector of int32, the last of them filled up with zeros."""
    flat = content.detach().reshape(-1)
    if flat.element_size() < 4:
        flat = flat.view(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))
    return flat.view(torch.int32)


def fold(content: Tensor) -> Tensor:
    """Few integers of a tensor of any length, of which at least one changes when one of its entries does.

    Its words (int32) are cut into 64 stretches, each of which is summed, and a rest: one pass, as fast as memory is.
    """
    flat = words(content)
    length = flat.numel() // _SUMS
    stretches = flat[: _SUMS * length].view(_SUMS, length).sum(dim=1, dtype=torch.int32)
    return torch.cat([stretches, flat[_SUMS * length :]])


SEAL = 4
"""Bytes of the checksum of a row of bytes."""


def checksum(content: Tensor) -> int:
    """A checksum of 32 bits of bytes (uint8), at the speed of memory."""
    return int.from_bytes(_checksums(content.unsqueeze(0)).cpu().numpy().tobytes(), "little")


def seal(rows: Tensor) -> Tensor:
    """Rows of bytes (uint8), each with its checksum behind it."""
    return torch.cat([rows, _checksums(rows)], dim=1)


def open_sealed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were sealed, and whether each of them came as it was sent."""
    content, checksums = rows[:, :-SEAL].clone(memory_format=torch.contiguous_format), rows[:, -SEAL:]
    return content, (checksums == _checksums(content)).all(dim=1)


def seal_lanes(rows: Tensor) -> None:
    """Replace the last lane of each row of float32 by a checksum of the others."""
    rows.view(torch.int32)[:, -1] = _checksums_of_lanes(rows)


def lanes_intact(rows: Tensor) -> Tensor:
    """Whether all rows of `seal_lanes` came as they were sent: a bool of their device."""
    return (rows.view(torch.int32)[:, -1] == _checksums_of_lanes(rows)).all()


def _checksums_of_lanes(rows: Tensor) -> Tensor:
    return rows.view(torch.int32)[:, :-1].sum(dim=1, dtype=torch.int32) ^ _MARK


def _checksums(rows: Tensor) -> Tensor:
    missing = -rows.shape[1] % 4
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()
    sums = padded.view(torch.int32).sum(dim=1, dtype=torch.int32) ^ _MARK
    return sums.view(torch.uint8).view(len(rows), SEAL)
