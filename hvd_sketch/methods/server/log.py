"""A record of what came to a server."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from enum import IntEnum, auto
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError

_FORMAT = struct.Struct("<BBiQdQ")


class Happened(IntEnum):
    """What an event is."""

    START = auto()  # the model that a server began with, and its version
    JOIN = auto()
    PUSH = auto()
    DONE = auto()
    LOST = auto()


_HAPPENED = frozenset(Happened)


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
    """The events of a file, in their order; an event that was cut off, as by a crash, ends them.

    Raises:
        ConfigurationError: when the file is no log.
    """
    if not isinstance(path, (str, Path)):
        raise ConfigurationError(f"path must be that of a file, got {path!r}")
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(_FORMAT.size)) == _FORMAT.size:
            what, code, worker, number, at, nbytes = _FORMAT.unpack(head)
            if what not in _HAPPENED:
                raise ConfigurationError(f"path: {path} is no log of a server; give what log= named")
            if nbytes > size - file.tell():
                return
            content = bytearray(file.read(nbytes))
            payload = torch.frombuffer(content, dtype=torch.uint8) if content else Event(Happened.START).payload
            yield Event(Happened(what), worker, number, code, at, payload)
