"""What nodes say to each other: a header of 16 bytes, and for some kinds a payload behind it."""

from __future__ import annotations

import struct
from enum import IntEnum, auto
from typing import NamedTuple

from torch import Tensor

_FORMAT = struct.Struct("<BBhIQ")
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


class Header(NamedTuple):
    """Kind, code of the payload (bits 0: full precision), and the number of the meeting or mean."""

    kind: Kind
    number: int = 0
    bits: int = 0
    exponent: int = 0
    checksum: int = 0

    def write(self, message: Tensor) -> Tensor:
        """Put the header in front of a message (uint8), and return the message."""
        content = _FORMAT.pack(self.kind, self.bits, self.exponent, self.checksum, self.number)
        message.numpy()[:HEADER] = bytearray(content)
        return message

    @classmethod
    def read(cls, message: Tensor) -> Header:
        """The header of a message."""
        kind, bits, exponent, checksum, number = _FORMAT.unpack(message.numpy()[:HEADER].tobytes())
        return cls(Kind(kind), number, bits, exponent, checksum)
