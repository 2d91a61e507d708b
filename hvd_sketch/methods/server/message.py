"""What workers and their server say to each other: a header of 16 bytes, and for some kinds a payload behind it."""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum, auto
from typing import NamedTuple

import torch
from torch import Tensor

_FORMAT = struct.Struct("<BBHIQ")
HEADER = _FORMAT.size
"""Bytes before the payload."""

LONGEST_REASON = 1000
"""Bytes of the text of an ABORT."""


class Kind(IntEnum):
    """What a message is."""

    JOIN = auto()  # worker: send me the whole model; number is the moment of my own state
    PUSH = auto()  # worker: my update; number is the version of the model that it began at
    PULL = auto()  # worker: let me look at the whole model
    DONE = auto()  # worker: no more pushes
    MODEL = auto()  # server: number is the version; the answer to JOIN, PUSH and PULL
    END = auto()  # server: everybody has done their part
    ABORT = auto()  # server: I take no more of your messages; the payload says why
    PING = auto()
    PONG = auto()
    GONE = auto()  # I have stopped by an error


class Note(IntEnum):
    """What a header adds to its kind."""

    NOTHING = 0
    ACCEPTED = auto()  # MODEL: your push changed the model
    REFUSED = auto()  # MODEL: it did not
    FRESH = auto()  # JOIN: I begin with an empty state of my own


class Unreadable(ValueError):
    """These bytes are no message."""


class Header(NamedTuple):
    """Kind, code of the payload, note, and a number that the kind explains."""

    kind: Kind
    number: int = 0
    code: int = 0
    note: Note = Note.NOTHING

    def write(self, *payload: Tensor) -> Tensor:
        """The message (uint8): this header, a checksum over everything, and the payload's parts (uint8)."""
        message = torch.cat([torch.empty(HEADER, dtype=torch.uint8, device="cpu"), *payload])
        message.numpy()[:HEADER] = bytearray(self._pack(0))
        message.numpy()[:HEADER] = bytearray(self._pack(zlib.crc32(message.numpy().data)))
        return message

    @classmethod
    def read(cls, message: Tensor) -> tuple[Header, Tensor, bool]:
        """The header of a message, its payload, and whether they are as they were written.

        Raises:
            Unreadable: when not even the header can be one.
        """
        if message.numel() < HEADER:
            raise Unreadable("a message shorter than a header, or longer than any may be")
        kind, code, note, checksum, number = _FORMAT.unpack(message[:HEADER].numpy().tobytes())
        try:
            header = cls(Kind(kind), number, code, Note(note))
        except ValueError as error:
            raise Unreadable(str(error)) from None
        payload = message[HEADER:]
        return header, payload, zlib.crc32(payload.numpy().data, zlib.crc32(header._pack(0))) == checksum

    def _pack(self, checksum: int) -> bytes:
        return _FORMAT.pack(self.kind, self.code, self.note, checksum, self.number)
