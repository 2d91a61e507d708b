"""A few numbers sent three times, so that one damaged on its way leads no rank another way than the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

COPIES = 3

Number = TypeVar("Number", int, float)


def thrice(numbers: Tensor) -> Tensor:
    """A few numbers to be sent for `majority`."""
    return numbers.repeat(COPIES)


def majority(copies: Sequence[Number]) -> list[Number]:
    """Of numbers that were sent three times, one after the other, what two of the three say."""
    count = len(copies) // COPIES
    each = zip(copies[:count], copies[count : 2 * count], copies[2 * count :], strict=True)
    return [one if one in (other, third) else other for one, other, third in each]
