"""Sums in few bits a value: each value has an owner, who receives it from all ranks, sums, and tells everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.bits import pack, packed_bytes, unpack
from hvd_sketch.comm.base import Communicator

BLOCK = 32
"""Neighbours that share a scale, of two bytes."""

_SCALE, _FLOAT = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Coarse:
    """A code for vectors: a scale for every block, which brings its largest magnitude to the largest of the codes.

    Attributes:
        bits: 4 or 8 of a value.
        floating: values are floats, of 4 bits of exponent and 3 of mantissa, off by a sixteenth at most down to
            ``2^-15`` of a block's largest; else integers, off by half a level, of which there are
            ``2^(bits - 1) - 1`` above zero.
    """

    bits: int = 8
    floating: bool = False

    @property
    def largest(self) -> float:
        """Of the codes."""
        return torch.finfo(_FLOAT).max if self.floating else 2.0 ** (self.bits - 1) - 1.0

    def encode(self, values: Tensor) -> Tensor:
        """The bytes of m vectors (float32), ``(m, count)``, a row each."""
        blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        scales = (blocks.abs().amax(2) / self.largest).to(_SCALE)
        steps = scales.float().clamp_min(torch.finfo(torch.float32).tiny)
        levels = (blocks / steps.unsqueeze(2)).clamp_(-self.largest, self.largest).flatten(1)[:, : values.shape[1]]
        if self.floating:
            packed = levels.to(_FLOAT).view(torch.uint8)
        else:
            size = len(values), packed_bytes(values.shape[1], self.bits)
            packed = torch.empty(size, dtype=torch.uint8, device=values.device)
            pack(levels.round_().to(torch.int8), self.bits, packed)
        return torch.cat([scales.view(torch.uint8), packed], dim=1)

    def decode(self, codes: Tensor, count: int) -> Tensor:
        """The ``(m, count)`` values behind codes."""
        head = _SCALE.itemsize * -(-count // BLOCK)
        scales = codes[:, :head].flatten().clone().view(_SCALE).view(len(codes), -1).float()
        if self.floating:
            values = codes[:, head:].contiguous().view(_FLOAT).float()
        else:
            values = torch.empty(len(codes), count, dtype=torch.float32, device=codes.device)
            unpack(codes[:, head:].contiguous(), self.bits, values)
        return values.mul_(scales.repeat_interleave(BLOCK, dim=1)[:, :count])


class Summed(NamedTuple):
    """A sum over the ranks, and what rounding did: over all ranks, ``sent`` adds up to the total and all ``lost``.

    Attributes:
        total: the sum, the same on all ranks.
        sent: what this rank's values counted as.
        lost: what this rank, as an owner, rounded off the sum; zero where it owns nothing.
    """

    total: Tensor
    sent: Tensor
    lost: Tensor


def sum_coarsely(
    values: Tensor, code: Coarse, comm: Communicator, name: str, unseal: Callable[[Tensor, str], Tensor]
) -> Summed:
    """Collective: the sum of a vector (float32) over the ranks, rounded once by every rank and once by its owner.

    An owner's own values are not rounded. Sends ``2 (W-1)/W`` codes in an alltoall and an allgather; not for ranks
    of which some have left with ``hvd.join``. ``unseal`` opens sealed rows that came under a name.
    """
    size, rank, count = comm.size, comm.rank, values.numel()
    up, down = f"{name}.up", f"{name}.down"
    share = -(-count // size)
    share = share if share < BLOCK else BLOCK * -(-share // BLOCK)
    shares = torch.nn.functional.pad(values, (0, share * size - count)).view(size, share)
    codes = code.encode(shares)
    sent = code.decode(codes, share)
    sent[rank] = shares[rank]
    received = code.decode(unseal(comm.alltoall(wire.seal(codes), up), up), share)
    received[rank] = shares[rank]
    owned = received.sum(0)
    gathered = comm.allgather(wire.seal(code.encode(owned.unsqueeze(0)))[0], down)
    total = code.decode(unseal(gathered, down), share)
    lost = torch.zeros_like(total)
    lost[rank] = owned - total[rank]
    return Summed(*(each.flatten()[:count] for each in (total, sent, lost)))
