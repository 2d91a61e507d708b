"""How floats travel: full precision, or half precision with a shared power-of-two scale."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

HEADER = 4
"""Lanes before the payload: non-finite marker, contributing ranks, ranks with a problem, ranks that want to flush."""

DIGEST_BITS = 32
_HALF_LIMIT = 32768.0
_HEADROOM = 8.0


def shared_scale(largest: float, ranks: int, dtype: torch.dtype) -> float:
    """A power of two that puts a sum of ``ranks`` values of mean size ``largest`` into range.

    Float32 needs none. In half precision the sum may still grow eightfold before it is clamped.
    ``largest`` must be the same number on every rank, so it comes from something reduced.
    """
    if dtype != torch.float16 or not 0.0 < largest < math.inf:
        return 1.0
    return 2.0 ** math.floor(math.log2(_HALF_LIMIT / (_HEADROOM * ranks * largest)))


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


def write_header(message: Tensor, finite: bool, problem: bool = False, flush: bool = False) -> None:
    """Mark this rank present, the sum as not a number if the gradient is not finite, a problem, a wish to flush."""
    message[0] = 0.0 if finite else math.nan
    message[1] = 1.0
    message[2] = float(problem)
    message[3] = float(flush)


def is_finite(message: Tensor) -> bool:
    """Whether every rank's gradient was finite."""
    return not math.isnan(float(message[0]))


def has_problem(message: Tensor) -> bool:
    """Whether any rank has something to report."""
    return float(message[2]) > 0.0


def wants_flush(message: Tensor) -> bool:
    """Whether any rank wants everything sent."""
    return float(message[3]) > 0.0


def is_void(message: Tensor) -> bool:
    """Whether nothing of what the step selected will be applied, for one of these reasons."""
    return not is_finite(message) or has_problem(message) or wants_flush(message)


def contributors(message: Tensor) -> int:
    """How many ranks took part: fewer than all once a rank has left by ``hvd.join``."""
    return int(message[1])


def write_digest(lanes: Tensor, indices: Tensor) -> None:
    """One lane a bit of a checksum of the chosen indices: sums tell whether all ranks agree."""
    digest = zlib.crc32(indices.cpu().numpy().tobytes())
    bits = [float(digest >> bit & 1) for bit in range(DIGEST_BITS)]
    lanes.copy_(torch.tensor(bits, dtype=lanes.dtype))


def digests_agree(lanes: Tensor, contributors: Tensor) -> bool:
    """Whether each bit was set by none or by all of the contributing ranks."""
    return bool(((lanes == 0) | (lanes == contributors)).all())
