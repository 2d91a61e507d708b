"""What nodes say to each other: a header of 16 bytes, and for some kinds a payload behind it."""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum, auto
from typing import NamedTuple

from torch import Tensor

from hvd_sketch import wire

_FORMAT = struct.Struct("<BBhIII")
HEADER = _FORMAT.size
"""Bytes before the payload."""


class Kind(IntEnum):
    """What a message is."""

    MEET = auto()  # my model, coded; answer with yours
    ANSWER = auto()  # mine before the meeting, in the same code; I have moved halfway
    TOO_FAR = auto()  # your model is outside my radius, nothing was changed; send full precision
    VOID = auto()  # nothing was changed, do not repeat it
    PING = auto()
    PONG = auto()
    SHARE = auto()  # my part of a mean, number says of which
    MEAN = auto()
    ASK = auto()  # have you the result of this mean? another rank that had it may have died
    GONE = auto()  # I have stopped and will not answer again


class Damaged(ValueError):
    """These bytes are not those that were sent."""


class Header(NamedTuple):
    """Kind, code of the payload (bits 0: full precision), number of the meeting or mean, and the code's checksum."""

    kind: Kind
    number: int = 0
    bits: int = 0
    exponent: int = 0
    checksum: int = 0

    def write(self, message: Tensor) -> Tensor:
        """Put the header in front of a message (uint8) that is complete otherwise, and return the message."""
        message.numpy()[:HEADER] = bytearray(self._pack(self._seal(message)))
        return message

    @classmethod
    def read(cls, message: Tensor) -> Header:
        """The header of a message.

        Raises:
            Damaged: when it, or the payload, is not what was sent.
        """
        if message.numel() < HEADER:
            raise Damaged("a message shorter than its header")
        kind, bits, exponent, checksum, number, seal = _FORMAT.unpack(message.numpy()[:HEADER].tobytes())
        try:
            header = cls(Kind(kind), number, bits, exponent, checksum)
        except ValueError as error:
            raise Damaged(str(error)) from None
        if header._seal(message) != seal:
            raise Damaged("the checksum is another one")
        return header

    def _seal(self, message: Tensor) -> int:
        """A checksum of the header and of what is behind it in a message."""
        return (zlib.crc32(self._pack(0)) + wire.checksum(message[HEADER:])) % 2**32

    def _pack(self, seal: int) -> bytes:
        return _FORMAT.pack(self.kind, self.bits, self.exponent, self.checksum, self.number, seal)


def kind_of(message: Tensor) -> Kind:
    """Of a message of one's own, which needs no check."""
    return Kind(int(message[0]))
