"""Sums in half precision that round nothing: integers on a grid that all ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.saved import Form, Maybe, Vector

BLOCK = 128
"""Neighbours that share a power of two."""

_EXACT = 2048
"""Half precision has every integer up to here."""

_LEAST = 16
_HEADROOM_BITS = 2
_MOST_BITS = 100
_LARGEST = 60_000.0


def serves(ranks: int, dtype: torch.dtype) -> bool:
    """Whether values of so many ranks travel in half precision; else in float32, for integers would be too few."""
    return dtype == torch.float16 and _EXACT // ranks >= _LEAST


def itemsize(ranks: int, dtype: torch.dtype) -> int:
    """Bytes of a lane of values that are to be of this dtype, once scales are known."""
    return 2 if serves(ranks, dtype) else 4


def lanes(entries: int, ranks: int, dtype: torch.dtype) -> int:
    """How many lanes the values of a `Grid` take: in half precision one more for each block."""
    return entries + (_blocks(entries) if serves(ranks, dtype) else 0)


def _blocks(entries: int) -> int:
    return -(-entries // BLOCK)


def scales_of(sizes: Tensor, ranks: int) -> Tensor:
    """Powers of two that bring values of these sizes (float32, not negative) to a quarter of the largest integer.

    Made of the sizes' exponents, so the same on every kind of machine.
    """
    bits = (_EXACT // ranks).bit_length() - 1 - _HEADROOM_BITS
    exponents = bits + 126 - (sizes.contiguous().view(torch.int32) >> 23)
    return (exponents.clamp_(-_MOST_BITS, _MOST_BITS) + 127 << 23).view(torch.float32)


def put(lanes: Tensor, values: Tensor, scales: Tensor, comm: Communicator) -> Tensor:
    """Write values as integers on the grid of ``1 / scales``; returns what is thereby sent, float32.

    With W ranks they are at most 2048 / W, so that every sum of some of them is an integer that half precision
    has. Each rank rounds at a threshold of its own, spread evenly over a level: W equal values are
    then off by one level in all, where W times the same rounding would be off by up to W / 2. Lanes of float32
    take the values as they are.
    """
    if lanes.dtype == torch.float32:
        lanes.copy_(values)
        return values.clone()
    limit, threshold = _EXACT // comm.size, (comm.rank + 0.5) / comm.size - 0.5
    integers = (values * scales).add_(threshold).round_().clamp_(-limit, limit)
    lanes.copy_(integers)
    return integers.div_(scales)


def take(lanes: Tensor, scales: Tensor) -> Tensor:
    """What all ranks `put`, float32."""
    return lanes.clone() if lanes.dtype == torch.float32 else lanes.float().div_(scales)


class Grid:
    """The scales of a vector, one for each block of neighbours, from how large the ranks' last values were there.

    Behind the values a message has a lane a block with the largest magnitude that a rank has in it: their sum, which
    all ranks know, makes the next scales. Until it is known, a message is in float32. Where half precision
    does not serve, all messages are, and have the values alone.

    Attributes:
        scales: float32; None until a sum other than zero was seen.
    """

    def __init__(self, entries: int, dtype: torch.dtype) -> None:
        self.scales: Tensor | None = None
        self._entries, self._dtype = entries, dtype

    def lanes(self, ranks: int) -> int:
        """How many a message needs; see `lanes`."""
        return lanes(self._entries, ranks, self._dtype)

    def dtype(self, ranks: int) -> torch.dtype:
        """What the coming message is to be sent in."""
        halves = serves(ranks, self._dtype) and (self.scales is not None or self._entries == 0)
        return torch.float16 if halves else torch.float32

    def resize(self, entries: int) -> None:
        """Go on with another number of values spread over the same vector."""
        self._entries, blocks = entries, _blocks(entries)
        before = 0 if self.scales is None else self.scales.numel()
        if self.scales is None or not before:
            self.scales = None
        elif before != blocks:
            self.scales = self.scales[torch.arange(blocks, device=self.scales.device) * before // max(1, blocks)]

    def restore(self, scales: Tensor | None, device: torch.device) -> None:
        """Take up scales of earlier; if they may be of another number of values, `resize` afterwards."""
        self.scales = None if scales is None else scales.to(device)

    def form(self, *, fixed: bool) -> Form:
        """What scales to `restore` look like."""
        if not fixed:
            return Maybe(Vector(torch.float32))
        return Maybe(torch.empty(_blocks(self._entries), dtype=torch.float32, device="cpu"))

    def put(self, lanes: Tensor, values: Tensor, comm: Communicator) -> Tensor:
        """Write at most as many values as there are entries; returns what is sent of them, float32."""
        count, sizes = values.numel(), lanes[self._entries :]
        lanes[count : self._entries] = 0.0
        if sizes.numel():
            largest = self._blocked(values.abs()).amax(1)
            sizes.copy_(largest if self._raw(lanes) else largest.mul_(self._scales()).clamp_(max=_LARGEST / comm.size))
        if self._raw(lanes):
            lanes[:count] = values
            return values.clone()
        return put(lanes[:count], values, self._of_each(count), comm)

    def take(self, lanes: Tensor, count: int, comm: Communicator, *, learn: bool) -> Tensor:
        """The sum of what the ranks `put` of so many values, float32; with ``learn`` the scales follow from it."""
        raw, sizes = self._raw(lanes), lanes[self._entries :].float()
        sums = lanes[:count].float() if raw else take(lanes[:count], self._of_each(count))
        if learn and sizes.numel():
            self._learn((sizes if raw else sizes.div_(self._scales())).div_(comm.size), comm.size)
        return sums

    def _learn(self, sizes: Tensor, ranks: int) -> None:
        """Where there was nothing the scale stays, and is the finest of all where there was never anything."""
        something, scales = sizes > 0.0, scales_of(sizes, ranks)
        if self.scales is None and not something.any():
            return
        others = torch.where(something, scales, 0.0).amax() if self.scales is None else self.scales
        self.scales = torch.where(something, scales, others)

    def _raw(self, lanes: Tensor) -> bool:
        return lanes.dtype == torch.float32 or self._entries == 0

    def _scales(self) -> Tensor:
        assert self.scales is not None
        return self.scales

    def _of_each(self, count: int) -> Tensor:
        """The scale of each value."""
        return self._scales().unsqueeze(1).expand(-1, BLOCK).reshape(-1)[:count]

    def _blocked(self, values: Tensor) -> Tensor:
        """The values, a block a row, zeros behind them."""
        padded = values.new_zeros(_blocks(self._entries), BLOCK)
        padded.view(-1)[: values.numel()] = values
        return padded
