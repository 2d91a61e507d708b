"""How a vector becomes the payload of a message, and what is left of it at the sender."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Code(ABC):
    """Turns vectors of one length into bytes and adds what they stand for to another vector.

    Sender and receiver add the same floats, so a copy that is kept up to date by both is the same
    to the bit. The bytes to `add` are not trusted.
    """

    number: ClassVar[int]
    """Of this code in a message's header."""

    @abstractmethod
    def encode(self, vector: Tensor, step: int) -> Tensor:
        """The payload (uint8) of the sender's message number ``step``; ``vector`` keeps what is not in it."""

    @abstractmethod
    def add(self, payload: Tensor, vector: Tensor) -> None:
        """Add what a payload stands for to a vector; its values may be anything, infinite too.

        Raises:
            ValueError: when these bytes cannot have come from `encode`; ``vector`` may have been changed in part.
        """

    @property
    @abstractmethod
    def most_bytes(self) -> int:
        """No payload is larger."""


class Whole(Code):
    """All values as they are."""

    number = 0

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self._dtype, self._nbytes = dtype, count * dtype.itemsize

    def encode(self, vector: Tensor, step: int) -> Tensor:
        payload = vector.clone().view(torch.uint8)
        vector.zero_()
        return payload

    def add(self, payload: Tensor, vector: Tensor) -> None:
        vector.add_(self.values(payload))

    def values(self, payload: Tensor) -> Tensor:
        """The vector behind a payload, without copying it.

        Raises:
            ValueError: for a wrong length.
        """
        if payload.numel() != self._nbytes:
            raise ValueError(f"{payload.numel()} bytes, the whole vector has {self._nbytes}")
        return payload.view(self._dtype)

    @property
    def most_bytes(self) -> int:
        return self._nbytes
