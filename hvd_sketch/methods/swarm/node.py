"""The arithmetic of meetings, without any communication: one node's published model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.methods.swarm.lattice import FullPrecision, Lattice, LatticeCode, OutsideRadius
from hvd_sketch.methods.swarm.message import HEADER, Header, Kind


@dataclass(eq=False)
class Offer:
    """A meeting that this node began: with whom, and what exactly it showed of its model."""

    number: int
    partner: int
    snapshot: Tensor
    began: float = field(default_factory=time.time)


class Node:
    """A node's published model Y, and what happens to it when it meets another::

        Y_i <- Y_i + (Q_j - Q_i) / 2          Y_j <- Y_j + (Q_i - Q_j) / 2

    Q is what the code keeps of Y at the time of the message: Y itself, or its lattice points. One
    node adds exactly what the other subtracts, so the sum over all nodes stays, whatever the
    code rounds, and because additions commute, meetings may overlap. (The published form
    ``Y_i = Y_j = (Q_i + Q_j) / 2`` moves the mean by the rounding errors.)

    A node learns from a lattice code whether the other will be able to decode its answer; when it
    will not, nothing is changed and the meeting is repeated in full precision. Values that are
    not finite are never taken in. The caller holds a lock.

    Args:
        model: Y, changed in place; finite.
        lattice: the quantiser, or none for full precision.
        buffers: where messages come from.
    """

    def __init__(self, model: Tensor, lattice: Lattice | None, buffers: Buffers) -> None:
        self.model, self._lattice, self.buffers = model, lattice, buffers
        count, dtype = model.numel(), model.dtype
        self._full = FullPrecision(count, dtype)
        self._coarse = LatticeCode(lattice.bits, count, dtype) if lattice else self._full
        self._mine, self._difference = torch.empty_like(model), torch.empty_like(model)
        self._snapshots: list[Tensor] = []
        self._numbers = 0
        self.distance: float | None = None  # the largest coordinate difference at the last meeting, at least a step

    def offer(self, partner: int) -> tuple[Offer, Tensor]:
        """Begin a meeting: the offer to keep and the message to send."""
        self._numbers += 1
        snapshot = self._snapshots.pop() if self._snapshots else torch.empty_like(self.model)
        offer = Offer(self._numbers, partner, snapshot)
        exponent = self._lattice.exponent(self.distance) if self._lattice else None
        return offer, self._encode(Kind.MEET, offer.number, exponent, snapshot)

    def insist(self, offer: Offer) -> Tensor:
        """The same meeting again in full precision, from the model as it is now."""
        return self._encode(Kind.MEET, offer.number, None, offer.snapshot)

    def answer(self, header: Header, message: Tensor) -> Tensor:
        """Be met: move halfway to the other model, and return the reply."""
        exponent = header.exponent if header.bits else None
        reply = self._encode(Kind.ANSWER, header.number, exponent, self._mine)
        try:
            taken = self._take_in(header, message, self._mine)
        except OutsideRadius:
            self.buffers.give(reply)
            return self._short(Kind.TOO_FAR, header.number)
        if not taken:
            self.buffers.give(reply)
            return self._short(Kind.VOID, header.number)
        return reply

    def conclude(self, offer: Offer, header: Header, message: Tensor) -> None:
        """Take the answer to an offer in: the other half of the meeting."""
        self._take_in(header, message, offer.snapshot)
        self.drop(offer)

    def drop(self, offer: Offer) -> None:
        """Forget an offer that will have no answer."""
        self._snapshots.append(offer.snapshot)

    def _take_in(self, header: Header, message: Tensor, mine: Tensor) -> bool:
        code = self._coarse if header.bits else self._full
        distance = code.difference(message[HEADER:], header.checksum, header.exponent, mine, self._difference)
        if not math.isfinite(distance):
            return False
        self.model.add_(self._difference, alpha=0.5)
        self.distance = max(distance, 2.0**header.exponent) if header.bits else distance
        return True

    def _encode(self, kind: Kind, number: int, exponent: int | None, snapshot: Tensor) -> Tensor:
        code = self._full if exponent is None else self._coarse
        message = self.buffers.take(HEADER + code.payload_bytes)
        checksum = code.encode(self.model, exponent or 0, message[HEADER:], snapshot)
        return Header(kind, number, code.bits, exponent or 0, checksum).write(message)

    def _short(self, kind: Kind, number: int) -> Tensor:
        return Header(kind, number).write(self.buffers.take(HEADER))
