"""Message buffers that are used again."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Buffers of bytes (uint8) by size, so that a steady state allocates nothing; for any thread."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def take(self, nbytes: int) -> Tensor:
        """A buffer of exactly ``nbytes`` with arbitrary content."""
        try:
            return self._free[nbytes].pop()
        except (KeyError, IndexError):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def give(self, buffer: Tensor) -> None:
        """Hand a buffer back for the next `take`."""
        self._free.setdefault(buffer.numel(), []).append(buffer)
