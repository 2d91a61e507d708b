"""Small signed integers packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` integers of ``bits`` bits take: 1, 2, 4, 8 or 16 bits each."""
    return 2 * count if bits == 16 else -(-count * bits // 8)


def pack(integers: Tensor, bits: int, packed: Tensor) -> None:
    """Write signed integers of ``bits`` bits (int8, or int16 for 16; 0 and -1 of one bit) to ``packed`` bytes (uint8).

    Below 8 bits a byte holds one integer of each of ``8 / bits`` equal parts of the vector, or of each row.
    """
    if bits == 16:
        packed.view(torch.int16).copy_(integers)
        return
    if bits == 8:
        packed.view(torch.int8).copy_(integers)
        return
    target = packed.view(torch.int8).zero_()
    for position, part in enumerate(torch.split(integers, packed.shape[-1], dim=-1)):
        target[..., : part.shape[-1]] |= (part & ((1 << bits) - 1)) << (bits * position)


def unpack(packed: Tensor, bits: int, values: Tensor) -> None:
    """Write the integers that `pack` packed to ``values``, of any floating dtype."""
    if bits >= 8:
        values.copy_(packed.view(torch.int16 if bits == 16 else torch.int8))
        return
    source = packed.view(torch.int8)
    for position, part in enumerate(torch.split(values, packed.shape[-1], dim=-1)):
        part.copy_((source[..., : part.shape[-1]] << (8 - bits * (position + 1))) >> (8 - bits))
