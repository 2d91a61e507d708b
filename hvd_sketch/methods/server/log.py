"""A record of what came to a server."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, auto
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_FORMAT = struct.Struct("<BBiQdQ")


class Happened(IntEnum):
    """What an event is."""

    START = auto()  # the model that a server began with, and its version
    JOIN = auto()
    PUSH = auto()
    DONE = auto()
    LOST = auto()


class Event(NamedTuple):
    """Something that changed a server's state.

    Attributes:
        what: happened.
        worker: the rank that it came from.
        number: of the message, see `hvd_sketch.methods.server.message.Kind`.
        code: of the payload; for a join 1 if it was fresh.
        at: seconds on the server's clock.
        payload: uint8.
    """

    what: Happened
    worker: int = -1
    number: int = 0
    code: int = 0
    at: float = 0.0
    payload: Tensor = torch.empty(0, dtype=torch.uint8, device="cpu")


class Log:
    """Writes events to a file, each with its payload as it came: about as many bytes as were received."""

    def __init__(self, path: Path | str) -> None:
        self._file = Path(path).open("wb")  # noqa: SIM115 - open as long as the server

    def write(self, event: Event) -> None:
        """Add an event."""
        what, worker, number, code, at, payload = event
        self._file.write(_FORMAT.pack(what, code, worker, number, at, payload.numel()))
        self._file.write(payload.numpy().data)
        self._file.flush()  # so that a crash leaves all that was applied


def read_log(path: Path | str) -> Iterator[Event]:
    """The events of a file, in their order; an event that was cut off, as by a crash, ends them."""
    with Path(path).open("rb") as file:
        while len(head := file.read(_FORMAT.size)) == _FORMAT.size:
            what, code, worker, number, at, nbytes = _FORMAT.unpack(head)
            content = bytearray(file.read(nbytes))
            if len(content) < nbytes:
                return
            payload = torch.frombuffer(content, dtype=torch.uint8) if content else Event(Happened.START).payload
            yield Event(Happened(what), worker, number, code, at, payload)
