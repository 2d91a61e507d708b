"""Packing: every integer comes back, in as few bytes as promised."""

import math

import pytest
import torch

from hvd_sketch.bits import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 7, 1000, 200_001])
def test_packing_keeps_every_integer(bits: int, count: int) -> None:
    half = 2 ** (bits - 1)
    integers = torch.randint(-half, half if bits > 1 else 1, (count,), dtype=torch.int16 if bits == 16 else torch.int8)
    packed = torch.empty(packed_bytes(count, bits), dtype=torch.uint8)
    assert packed.numel() == math.ceil(count * bits / 8)
    pack(integers, bits, packed)
    values = torch.empty(count)
    unpack(packed, bits, values)
    assert torch.equal(values, integers.to(values.dtype))
