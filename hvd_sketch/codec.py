"""Sparse vectors in few bytes: packed ascending indices, and values of eight bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_STEPS = 8
_ZERO = 127
# 2 ** (-j / 8), so that every machine decodes the same bits
_EIGHTHS = (
    1.0,
    0.9170040432046712,
    0.8408964152537145,
    0.7711054127039704,
    0.7071067811865476,
    0.6484197773255048,
    0.5946035575013605,
    0.5452538663326288,
)
_MAGNITUDES = torch.tensor(
    [_EIGHTHS[code % _STEPS] * 2.0 ** -(code // _STEPS) for code in range(_ZERO)] + [0.0], dtype=torch.float32
)


@dataclass(frozen=True)
class SparseCodec:
    """Code for ``count`` (index, value) pairs with distinct ascending indices below ``universe``.

    Always the same number of bytes: 4 for the largest magnitude, one a value, and about
    ``2 + log2(universe / count)`` bits an index.

    - Values: sign, and magnitude as ``largest * 2^(-code/8)``, code 0 … 126, or zero. The relative
      error is at most ``2^(1/16) - 1 = 4.4 %`` down to ``largest / 2^15.75``; what lies below
      ``2^-15.82`` of the largest becomes zero. `encode` returns what the receiver will see, so
      that the sender can keep the rest.
    - Indices: Elias-Fano (Elias 1974; Fano 1971): the lower ``l = floor(log2(universe / count))``
      bits as they are, the upper ones in unary.
    """

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
    def nbytes(self) -> int:
        """Bytes of one encoded vector."""
        return 4 + self.count + self._low_bytes + -(-self._high_bits // 8)

    def encode(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode m vectors given by ``(m, count)`` indices (int64, ascending) and values (float32).

        Returns the code, uint8 of shape ``(m, nbytes)``, and the values as they will be decoded.
        """
        largest = values.abs().amax(dim=1, keepdim=True)
        share = values.abs() / largest.clamp_min(torch.finfo(torch.float32).tiny)
        codes = (share.log2() * -_STEPS).round_().clamp_(0, _ZERO).to(torch.uint8)
        signed = codes | (values < 0).to(torch.uint8) << 7
        parts = [largest.view(torch.uint8), signed, self._pack(indices)]
        return torch.cat(parts, dim=1), self._values(signed, largest)

    def decode(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """The ``(m, count)`` indices and values behind a code of shape ``(m, nbytes)``."""
        largest = code[:, :4].flatten().clone().view(torch.float32).unsqueeze(1)
        values = self._values(code[:, 4 : 4 + self.count], largest)
        return self._unpack(code[:, 4 + self.count :]), values

    def _values(self, signed: Tensor, largest: Tensor) -> Tensor:
        magnitude = _MAGNITUDES.to(signed.device)[(signed & 127).to(torch.int64)] * largest
        return torch.where(signed > 127, -magnitude, magnitude)

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
        high = np.flatnonzero(unary).reshape(len(packed), self.count) % self._high_bits - np.arange(self.count)
        weights = np.left_shift(1, np.arange(self._low_bits), dtype=np.int64)
        return torch.from_numpy((high << self._low_bits) + low @ weights).to(code.device)
