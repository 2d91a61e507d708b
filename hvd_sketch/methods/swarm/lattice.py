"""Models as integers on a lattice, for a receiver that knows them roughly."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch.bits import pack, packed_bytes, unpack
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.settings import check_numbers

_CHUNK = 1 << 16  # values worked on at a time: their temporaries stay in the cache


class OutsideRadius(ArithmeticError):
    """Two models are too far apart for the lattice; nothing was decoded."""


@dataclass(frozen=True)
class Lattice:
    """Modulo quantisation of a model that the receiver already knows roughly.

    With step s and q = 2^bits, a coordinate x is sent as the colour of its lattice point, and
    the receiver takes the point of that colour nearest to its own r, on its own model::

        k = round(x / s)      colour = k mod q      k' = k_r + centred((colour - k_r) mod q)

    The error is at most s/2 whatever the model's norm, as long as the two models differ by less
    than the radius s (q/2 - 1) in every coordinate. Farther apart the formula alone would be
    wrong by multiples of q s; a checksum of all k travels along, and `OutsideRadius` is raised.
    The step is a power of two (rounded down), so lattice points and their sums are exact floats.
    Sent: ``bits`` a coordinate, and the checksum.
    Source: Davies et al., "New bounds for distributed mean estimation and variance reduction"
    (ICLR 2021), used by SwarmSGD, arXiv 1910.12308.

    Args:
        bits: 4, 8 or 16.
        step: s, in the units of the parameters. When not given it follows the largest
            coordinate difference of the last meeting, with ``headroom`` times that as radius.
        headroom: how much farther apart than at the last meeting two models may be; at most
            (q/2 - 1) / 2, so that the step can follow when models approach.
    """

    bits: int
    step: float | None = None
    headroom: float = 3.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.bits not in (4, 8, 16):
            raise ConfigurationError(f"Lattice bits must be 4, 8 or 16, got {self.bits}")
        if self.step is not None and not 2.0**-100 < self.step < 2.0**100:
            raise ConfigurationError(f"Lattice step must be a positive size in the parameters' units, got {self.step}")
        if not 1.0 <= self.headroom <= self.points / 2:
            raise ConfigurationError(f"Lattice headroom must be from 1 to {self.points / 2}, got {self.headroom}")

    @property
    def points(self) -> int:
        """Radius in steps."""
        return (1 << (self.bits - 1)) - 1

    def exponent(self, distance: float | None) -> int | None:
        """Binary exponent of the step after two models differed by ``distance``; None: not known yet."""
        if self.step is not None:
            return math.floor(math.log2(self.step))
        if not distance:
            return None
        return min(max(math.ceil(math.log2(self.headroom * distance / self.points)), -100), 100)


class FullPrecision:
    """The values themselves, in the interface of `LatticeCode`; bits are 0 on the wire."""

    bits = 0

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.payload_bytes = count * dtype.itemsize
        self._dtype = dtype

    def encode(self, values: Tensor, exponent: int, payload: Tensor, snapshot: Tensor) -> int:
        """Write the values to the payload, and keep them; the checksum is 0."""
        payload.view(self._dtype).copy_(values)
        snapshot.copy_(values)
        return 0

    def difference(self, payload: Tensor, checksum: int, exponent: int, snapshot: Tensor, out: Tensor) -> float:
        """Write theirs minus mine to ``out``; return the largest absolute difference, maybe not finite."""
        torch.sub(payload.view(self._dtype), snapshot, out=out)
        return float(torch.linalg.vector_norm(out, math.inf))


class LatticeCode:
    """Encodes and compares vectors of ``count`` values of one dtype on lattices of any step.

    Two nodes that both encoded their vectors with one exponent learn the exact difference of
    their lattice points, and one of them succeeds if and only if the other does.
    """

    def __init__(self, bits: int, count: int, dtype: torch.dtype) -> None:
        self.bits = bits
        self.payload_bytes = packed_bytes(count, bits)
        chunk = min(count, _CHUNK)
        self._integers = torch.empty(chunk, dtype=torch.int16 if bits == 16 else torch.int8, device="cpu")
        self._scratch = torch.empty(2, chunk, dtype=dtype, device="cpu")

    def encode(self, values: Tensor, exponent: int, payload: Tensor, snapshot: Tensor) -> int:
        """Write the colours of finite ``values`` to ``payload`` (uint8) and their lattice indices to ``snapshot``.

        Returns:
            the checksum of the indices.
        """
        checksum = 0
        for start, stop, packed in self._chunks(values.numel(), payload):
            indices, colours = snapshot[start:stop], self._scratch[0, : stop - start]
            torch.mul(values[start:stop], 2.0**-exponent, out=indices).round_().add_(0.0)  # -0.0 becomes 0.0
            self._centre(indices, colours)
            pack(self._integers[: stop - start].copy_(colours), self.bits, packed)
            checksum = zlib.crc32(indices.numpy().data, checksum)
        return checksum

    def difference(self, payload: Tensor, checksum: int, exponent: int, snapshot: Tensor, out: Tensor) -> float:
        """Write their lattice point minus mine to ``out``; return the largest absolute difference.

        Raises:
            OutsideRadius: when some coordinate's difference is not below the radius, or the
                message was damaged; ``out`` is then meaningless.
        """
        theirs_checksum, reach = 0, 0.0
        for start, stop, packed in self._chunks(snapshot.numel(), payload):
            indices, difference = snapshot[start:stop], out[start:stop]
            theirs, mine = self._scratch[0, : stop - start], self._scratch[1, : stop - start]
            unpack(packed, self.bits, theirs)
            self._centre(indices, mine)
            self._centre(theirs.sub_(mine), difference)
            reach = max(reach, float(torch.linalg.vector_norm(difference, math.inf)))
            torch.add(indices, difference, out=theirs)
            theirs_checksum = zlib.crc32(theirs.numpy().data, theirs_checksum)
        if theirs_checksum != checksum or reach >= 2 ** (self.bits - 1):
            raise OutsideRadius(f"models differ by more than {2.0**exponent * (2 ** (self.bits - 1) - 1):.3g}")
        out.mul_(2.0**exponent)
        return reach * 2.0**exponent

    def _centre(self, indices: Tensor, out: Tensor) -> None:
        """The representative of ``indices`` modulo q in -q/2 … q/2 - 1; exact, as q is a power of two."""
        modulus = 2.0**self.bits
        torch.mul(indices, 1.0 / modulus, out=out).add_(0.5).floor_().mul_(-modulus).add_(indices)

    def _chunks(self, count: int, payload: Tensor) -> list[tuple[int, int, Tensor]]:
        starts = range(0, count, _CHUNK)
        width = packed_bytes(_CHUNK, self.bits)
        parts = torch.split(payload, width)
        return [(start, min(start + _CHUNK, count), part) for start, part in zip(starts, parts, strict=True)]
