"""Sparse vectors in few bytes: packed ascending indices, and values of four bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_sketch import native

_LEVELS = 8
_NEGATIVE = 8


@dataclass(frozen=True)
class SparseCodec:
    """Code for ``count`` (index, value) pairs with distinct ascending indices below ``universe``.

    Always the same number of bytes: 32 for the levels, half a byte a value, and about
    ``2 + log2(universe / count)`` bits an index.

    - Values: a sign and one of eight levels, each sent as what it stands for: level 0 is zero, level
      j the mean of the magnitudes in ``[t 2^(j-1), t 2^j)``, where t is the least magnitude above
      zero, or ``largest / 2^7`` if that is more; the first and the last are open. The largest values
      keep their size, the error of a value is at most its own magnitude or ``largest / 2^6``, and
      the sum of the magnitudes stays. `encode` returns what the receiver will see, so that the
      sender can keep the rest.
    - Indices: Elias-Fano (Elias 1974; Fano 1971): the lower ``l = floor(log2(universe / count))``
      bits as they are, the upper ones in unary.
    """

    LEVEL_BYTES: ClassVar[int] = 4 * _LEVELS

    universe: int
    count: int

    @property
    def _low_bits(self) -> int:
        return max(0, (self.universe // self.count).bit_length() - 1)

    @property
    def _low_bytes(self) -> int:
        return -(-self.count * self._low_bits // 8)

    @property
    def _high_bits(self) -> int:
        return self.count + (self.universe >> self._low_bits) + 1

    @property
    def _value_bytes(self) -> int:
        return self.LEVEL_BYTES + -(-self.count // 2)

    @property
    def nbytes(self) -> int:
        """Bytes of one encoded vector."""
        return self._value_bytes + self._low_bytes + -(-self._high_bits // 8)

    def encode(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode m vectors given by ``(m, count)`` indices (int64, ascending) and values (float32).

        Returns the code, uint8 of shape ``(m, nbytes)``, and the values as they will be decoded.
        """
        if not native.serves(values):
            return self._encode(indices, values)
        indices, values = indices.contiguous(), values.contiguous()
        code = torch.empty(len(values), self.nbytes, dtype=torch.uint8)
        decoded = torch.empty_like(values)
        pointers = (tensor.data_ptr() for tensor in (indices, values, code, decoded))
        native.library().sparse_encode(self.universe, self.count, len(values), *pointers, torch.get_num_threads())
        return code, decoded

    def decode(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """The ``(m, count)`` indices and values behind a code of shape ``(m, nbytes)``.

        Raises:
            ValueError: when these bytes cannot have come from `encode`.
        """
        if not native.serves(code):
            return self._decode(code)
        code = code.contiguous()
        indices = torch.empty(len(code), self.count, dtype=torch.int64)
        values = torch.empty(len(code), self.count, dtype=torch.float32)
        pointers = (tensor.data_ptr() for tensor in (code, indices, values))
        threads = torch.get_num_threads()
        if not native.library().sparse_decode(self.universe, self.count, len(code), *pointers, threads):
            raise ValueError(self._no_code())
        return indices, values

    def _encode(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        magnitudes = values.abs()
        levels = _levels_of(magnitudes)
        shape = (len(values), _LEVELS)
        totals = magnitudes.new_zeros(shape).scatter_add_(1, levels, magnitudes)
        means = totals / magnitudes.new_zeros(shape).scatter_add_(1, levels, torch.ones_like(values)).clamp_min_(1.0)
        nibbles = (levels + (values < 0) * _NEGATIVE).to(torch.uint8)
        even = torch.nn.functional.pad(nibbles, (0, self.count % 2)).view(len(values), -1, 2)
        packed = even[:, :, 0] | even[:, :, 1] << 4
        code = torch.cat([means.view(torch.uint8), packed, self._pack(indices)], dim=1)
        return code, _values(nibbles, means)

    def _decode(self, code: Tensor) -> tuple[Tensor, Tensor]:
        means = code[:, : self.LEVEL_BYTES].flatten().clone().view(torch.float32).view(-1, _LEVELS)
        packed = code[:, self.LEVEL_BYTES : self._value_bytes]
        nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, : self.count]
        return self._unpack(code[:, self._value_bytes :]), _values(nibbles, means)

    def _pack(self, indices: Tensor) -> Tensor:
        ascending = indices.cpu().numpy()
        low = ascending[:, :, None] >> np.arange(self._low_bits) & 1
        low_code = np.packbits(low.astype(np.uint8).reshape(len(ascending), -1), axis=1)
        unary = np.zeros((len(ascending), self._high_bits), np.uint8)
        np.put_along_axis(unary, (ascending >> self._low_bits) + np.arange(self.count), 1, axis=1)
        packed = np.concatenate([low_code, np.packbits(unary, axis=1)], axis=1)
        return torch.from_numpy(packed).to(indices.device)

    def _unpack(self, code: Tensor) -> Tensor:
        packed: npt.NDArray[np.uint8] = code.cpu().numpy()
        bits = self.count * self._low_bits
        low = np.unpackbits(packed[:, : self._low_bytes], axis=1)[:, :bits].reshape(len(packed), self.count, -1)
        unary = np.unpackbits(packed[:, self._low_bytes :], axis=1)[:, : self._high_bits]
        if (unary.sum(axis=1, dtype=np.int64) != self.count).any():
            raise ValueError(self._no_code())
        high = np.flatnonzero(unary).reshape(len(packed), self.count) % self._high_bits - np.arange(self.count)
        weights = np.left_shift(1, np.arange(self._low_bits), dtype=np.int64)
        indices = (high << self._low_bits) + low @ weights
        if indices.max() >= self.universe:
            raise ValueError(self._no_code())
        return torch.from_numpy(indices).to(code.device)

    def _no_code(self) -> str:
        return f"these {self.nbytes} bytes are no code of {self.count} of {self.universe} coordinates"


def _levels_of(magnitudes: Tensor) -> Tensor:
    largest = magnitudes.amax(dim=1, keepdim=True)
    least = magnitudes.where(magnitudes > 0, largest).amin(dim=1, keepdim=True)
    first = torch.maximum(least, largest / 2 ** (_LEVELS - 1)).clamp_min_(torch.finfo(torch.float32).tiny)
    bounds = first * torch.exp2(torch.arange(1, _LEVELS - 1, device=magnitudes.device))
    return torch.searchsorted(bounds, magnitudes, right=True) + (magnitudes > 0)


def _values(nibbles: Tensor, means: Tensor) -> Tensor:
    magnitudes = means.gather(1, (nibbles & (_NEGATIVE - 1)).to(torch.int64))
    return torch.where(nibbles >= _NEGATIVE, -magnitudes, magnitudes)
