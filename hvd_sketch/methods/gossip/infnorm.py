"""Unbiased quantisation of vectors by their largest values, for differences that shrink."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch.bits import pack, packed_bytes, unpack
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.settings import check_numbers


@dataclass(frozen=True)
class InfNorm:
    """Unbiased stochastic quantisation to ``bits`` bits, scaled by each block's largest value.

    With L = 2^(bits-1) - 1 levels on each side and u uniform in [0, 1)::

        scale = max |v| over the block      v^ = scale / L * floor(L v / scale + u)

    E v^ = v, and the error of a coordinate is below scale / L. One level fewer than in the
    published form, whose 2^bits + 1 values do not fit into ``bits`` bits. Sent: ``bits`` a
    coordinate and a float32 a block.
    Source: Liu et al., "Linear convergent decentralized optimization with compression" (ICLR 2021).

    Args:
        bits: 2, 4 or 8.
        block: coordinates that share a scale.
    """

    bits: int = 4
    block: int = 512

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.bits not in (2, 4, 8):
            raise ConfigurationError(f"InfNorm bits must be 2, 4 or 8, got {self.bits}")
        if self.block < 1:
            raise ConfigurationError(f"InfNorm block must be at least 1, got {self.block}")


class InfNormCode:
    """Encodes vectors of ``count`` values; every holder of a message decodes the same bits.

    Args:
        quantizer: bits and block.
        count: length of the vectors.
        dtype: dtype of the vectors, float32 or float64.
        seed: of the random numbers, different on every rank.
    """

    def __init__(self, quantizer: InfNorm, count: int, dtype: torch.dtype, seed: int) -> None:
        self._bits, self._levels, self._count = quantizer.bits, 2 ** (quantizer.bits - 1) - 1, count
        blocks = -(-count // quantizer.block)
        self._values = torch.zeros(blocks, quantizer.block, dtype=dtype, device="cpu")
        self._random = torch.empty_like(self._values)
        self._integers = torch.empty(self._values.numel(), dtype=torch.int8, device="cpu")
        self._generator = torch.Generator().manual_seed(seed)
        self._scale_bytes = 4 * blocks
        self.message_bytes = self._scale_bytes + packed_bytes(self._values.numel(), quantizer.bits)

    def encode(self, values: Tensor, message: Tensor) -> None:
        """Write scales and integers of finite ``values`` to ``message`` (uint8)."""
        self._values.view(-1)[: self._count].copy_(values)
        largest = torch.linalg.vector_norm(self._values, math.inf, dim=1)
        scales = message[: self._scale_bytes].view(torch.float32)
        scales.copy_(largest)
        too_small = scales.to(largest.dtype) < largest
        scales.copy_(torch.where(too_small, torch.nextafter(scales, torch.full_like(scales, math.inf)), scales))
        factors = torch.where(scales > 0, self._levels / scales.to(largest.dtype), 0.0)
        self._random.uniform_(generator=self._generator)
        self._random.addcmul_(self._values, factors.unsqueeze(1)).floor_().clamp_(-self._levels, self._levels)
        pack(self._integers.copy_(self._random.view(-1)), self._bits, message[self._scale_bytes :])

    def decode(self, message: Tensor, out: Tensor) -> None:
        """Write the quantised values of a message to ``out``."""
        unpack(message[self._scale_bytes :], self._bits, self._random.view(-1))
        scales = message[: self._scale_bytes].view(torch.float32).to(out.dtype)
        self._random.mul_(scales.unsqueeze(1) / self._levels)
        out.copy_(self._random.view(-1)[: self._count])
