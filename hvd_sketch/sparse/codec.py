"""Sparse vectors in few bytes: packed ascending indices, and values of four bits."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from hvd_sketch import gpu, native

VERSION = 2
"""Of this code: ranks of different versions cannot read each other's."""

_LEVELS = 8
_NEGATIVE = 8
_LARGEST = 0x7F7F0000  # the bits of the largest finite float32 whose lower half is zero
_NOT_A_NUMBER = 0x7FC00000


@dataclass(frozen=True)
class SparseCodec:
    """Code for ``count`` (index, value) pairs with distinct ascending indices below ``universe``.

    Always the same number of bytes: 14 for the levels, half a byte a value, and about
    ``2 + log2(universe / count)`` bits an index. Of 31 648 coordinates 165 take 14.3 bits each and 46 take 17.9;
    their indices alone have an entropy of 9.0 and 10.8.

    - Values: a sign and one of eight levels, each but the first sent as what it stands for: level 0 is zero, level
      j the mean of the magnitudes in ``[t 2^(j-1), t 2^j)``, where t is the least magnitude above
      zero, or ``largest / 2^7`` if that is more; the first and the last are open. A mean travels as the upper half
      of its float32 (bfloat16), rounded to the nearest, of two to the even one, and never to infinity. So to a part
      in 2^8 the largest values keep their size, and the sum of the magnitudes stays; the error of a value is at most
      ``1 + 2^-7`` times its own magnitude or ``largest / 2^6``, and that of all together no larger than they are:
      ``|values - decoded| <= |values|``. A level's magnitudes are summed in their places among all, in pairs of
      neighbours and then in pairs of those, so a code has the same bytes wherever it was made. What is not a number
      counts in the last level, and makes it one. `encode` returns what the receiver will see, so that the sender can
      keep the rest.
    - Indices: Elias-Fano (Elias 1974; Fano 1971): the lower ``l = floor(log2(universe / count))``
      bits as they are, the upper ones in unary.
    """

    LEVEL_BYTES: ClassVar[int] = 2 * (_LEVELS - 1)

    universe: int
    count: int

    @property
    def low_bits(self) -> int:
        """Bits of an index that are sent as they are."""
        return max(0, (self.universe // self.count).bit_length() - 1)

    @property
    def low_bytes(self) -> int:
        """Bytes of these."""
        return -(-self.count * self.low_bits // 8)

    @property
    def high_bits(self) -> int:
        """Bits of the upper parts of all indices, in unary."""
        return self.count + (self.universe >> self.low_bits) + 1

    @property
    def value_bytes(self) -> int:
        """Bytes of levels and values."""
        return self.LEVEL_BYTES + -(-self.count // 2)

    @property
    def nbytes(self) -> int:
        """Bytes of one encoded vector."""
        return self.value_bytes + self.low_bytes + -(-self.high_bits // 8)

    def encode(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode m vectors given by ``(m, count)`` indices (int64, ascending) and values (float32).

        Returns the code, uint8 of shape ``(m, nbytes)``, and the values as they will be decoded.
        """
        if gpu.serves(values):
            code, decoded = _on_gpu().encode(self, indices.contiguous(), values.contiguous())
            return code, decoded
        if not native.serves(values):
            return self._encode(indices, values)
        indices, values = indices.contiguous(), values.contiguous()
        code = torch.empty(len(values), self.nbytes, dtype=torch.uint8, device="cpu")
        decoded = torch.empty_like(values)
        count = len(values) * self.count
        native.library().sparse_encode(
            self.universe,
            self.count,
            len(values),
            native.address(indices, torch.int64, count),
            native.address(values, torch.float32, count),
            code.data_ptr(),
            decoded.data_ptr(),
            torch.get_num_threads(),
        )
        return code, decoded

    def decode(self, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ``(m, count)`` indices and values behind a code of shape ``(m, nbytes)``.

        The third result says of each row whether it may have come from `encode`; if not, its indices, which are then
        below ``count``, and its values mean nothing.
        """
        if gpu.serves(code):
            indices, values = _on_gpu().decode(self, code.contiguous())
            known = ~values.isnan().any(1) & (indices[:, 1:] > indices[:, :-1]).all(1)
            return self._checked(indices, values, known)
        if not native.serves(code):
            return self._decode(code)
        code = code.contiguous()
        indices = torch.empty(len(code), self.count, dtype=torch.int64, device="cpu")
        values = torch.empty(len(code), self.count, dtype=torch.float32, device="cpu")
        known = torch.empty(len(code), dtype=torch.bool, device="cpu")
        native.library().sparse_decode(
            self.universe,
            self.count,
            len(code),
            native.address(code, torch.uint8, len(code) * self.nbytes),
            indices.data_ptr(),
            values.data_ptr(),
            known.data_ptr(),
            torch.get_num_threads(),
        )
        return self._checked(indices, values, known)

    def _encode(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        magnitudes = values.abs()
        levels = _levels_of(magnitudes)
        means = _rounded(_means_of(magnitudes, levels))
        nibbles = (levels + (values < 0) * _NEGATIVE).to(torch.uint8)
        even = torch.nn.functional.pad(nibbles, (0, self.count % 2)).view(len(values), -1, 2)
        packed = even[:, :, 0] | even[:, :, 1] << 4
        upper = (means[:, 1:].contiguous().view(torch.int32) >> 16).to(torch.int16)
        code = torch.cat([upper.view(torch.uint8), packed, self._pack(indices)], dim=1)
        return code, _values(nibbles, means)

    def _decode(self, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        upper = code[:, : self.LEVEL_BYTES].flatten().clone().view(torch.int16).view(-1, _LEVELS - 1)
        means = torch.nn.functional.pad(upper.to(torch.int32) << 16, (1, 0)).view(torch.float32)
        packed = code[:, self.LEVEL_BYTES : self.value_bytes]
        nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, : self.count]
        indices, known = self._unpack(code[:, self.value_bytes :])
        return self._checked(indices, _values(nibbles, means), known)

    def _checked(self, indices: Tensor, values: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With indices that there are, ascending ones, where a row is unknown."""
        anywhere = torch.arange(self.count, device=indices.device)
        return indices.where(known.unsqueeze(1), anywhere), values, known

    def _pack(self, indices: Tensor) -> Tensor:
        low = indices.unsqueeze(2) >> torch.arange(self.low_bits, device=indices.device) & 1
        unary = indices.new_zeros(len(indices), self.high_bits, dtype=torch.uint8)
        unary.scatter_(1, (indices >> self.low_bits) + torch.arange(self.count, device=indices.device), 1)
        return torch.cat([_bytes_of(low.to(torch.uint8).flatten(1)), _bytes_of(unary)], dim=1)

    def _unpack(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """Indices, and which of them may have been packed."""
        bits = _bits_of(code[:, : self.low_bytes])[:, : self.count * self.low_bits]
        weights = torch.arange(self.low_bits, device=code.device)
        low = (bits.view(len(code), self.count, self.low_bits).to(torch.int64) << weights).sum(dim=2)
        unary, beyond = _bits_of(code[:, self.low_bytes :]).tensor_split((self.high_bits,), dim=1)
        ranks = unary.cumsum(1, dtype=torch.int64)
        # A one goes to its rank, everything else to a place behind them all.
        places = torch.where(unary > 0, ranks - 1, self.count).clamp_(max=self.count)
        ones = torch.zeros(len(code), self.count + 1, dtype=torch.int64, device=code.device)
        ones.scatter_(1, places, torch.arange(self.high_bits, device=code.device).expand_as(places))
        high = ones[:, : self.count] - torch.arange(self.count, device=code.device)
        indices = (high << self.low_bits) + low
        ascending = (indices[:, 1:] > indices[:, :-1]).all(1)
        complete = (ranks[:, -1] == self.count) & (beyond == 0).all(1)
        return indices, ascending & (indices[:, -1] < self.universe) & complete


def _on_gpu() -> ModuleType:
    return importlib.import_module("hvd_sketch.sparse.codec_cuda")  # with Triton, which no other device needs


def _levels_of(magnitudes: Tensor) -> Tensor:
    magnitudes = magnitudes.nan_to_num(torch.inf, posinf=torch.inf)
    largest = magnitudes.amax(dim=1, keepdim=True)
    least = magnitudes.where(magnitudes > 0, largest).amin(dim=1, keepdim=True)
    first = torch.maximum(least, largest / 2 ** (_LEVELS - 1)).clamp_min_(torch.finfo(torch.float32).tiny)
    powers = 1 << torch.arange(1, _LEVELS - 1, device=magnitudes.device)
    return torch.searchsorted(first * powers.to(torch.float32), magnitudes, right=True) + (magnitudes > 0)


def _means_of(magnitudes: Tensor, levels: Tensor) -> Tensor:
    """The mean magnitude of each level, ``(m, levels)``; of a level without any it is zero."""
    members = levels.unsqueeze(1) == torch.arange(_LEVELS, device=levels.device).unsqueeze(1)
    sums = torch.where(members, magnitudes.unsqueeze(1), 0.0)
    while sums.shape[2] > 1:
        sums = torch.nn.functional.pad(sums, (0, sums.shape[2] % 2))
        sums = sums[:, :, ::2] + sums[:, :, 1::2]
    return sums.squeeze(2) / members.sum(dim=2).clamp_min_(1).to(torch.float32)


def _rounded(means: Tensor) -> Tensor:
    """The nearest numbers that bfloat16 has, of two the even one; infinite only if they were."""
    bits = means.view(torch.int32)
    finite = bits.clamp_max(_LARGEST).where(means.isfinite(), bits)
    bits = finite + 0x7FFF + (finite >> 16 & 1) & ~0xFFFF
    return bits.masked_fill(means.isnan(), _NOT_A_NUMBER).view(torch.float32)


def _values(nibbles: Tensor, means: Tensor) -> Tensor:
    magnitudes = means.gather(1, (nibbles & (_NEGATIVE - 1)).to(torch.int64))
    return torch.where(nibbles >= _NEGATIVE, -magnitudes, magnitudes)


def _bytes_of(bits: Tensor) -> Tensor:
    """Rows of bits (uint8) eight to a byte, the first one the highest."""
    eights = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
    return (eights << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)).sum(dim=2, dtype=torch.uint8)


def _bits_of(packed: Tensor) -> Tensor:
    """The bits (uint8) of rows of bytes."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(2) >> shifts & 1).flatten(1)
