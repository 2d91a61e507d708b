"""Coordinates of a vector, by whatever rule they were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Places(Protocol):
    """Coordinates that know how to read and to write their values, which come and go in one order."""

    @property
    def numbers(self) -> Tensor:
        """Integers that tell these coordinates from others."""

    def at(self, vector: Tensor) -> Tensor:
        """The values of a vector there."""

    def put(self, vector: Tensor, values: Tensor | float) -> None:
        """Set these entries of a vector, contiguous and float32."""

    def put_in_pieces(self, pieces: Mapping[int, Tensor], values: Tensor, *, clear: bool) -> None:
        """Set these entries of a vector of which only pieces are there, where `native.serves`.

        ``pieces`` are contiguous float32 tensors of any shape by the coordinate of their first element, ascending;
        with ``clear`` all other entries become zero.
        """
