"""Synchronous means that bear a minority of hostile workers, and the one that bears none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import Gathered, Push, check
from hvd_sketch.settings import given_numbers


class _Combined(Gathered):
    """``x <- x - combination of all u_i``."""

    def _combine(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        model.sub_(self.combine(torch.stack([push.change for push in pushes])))
        return [True] * len(pushes)

    @abstractmethod
    def combine(self, updates: Tensor) -> Tensor:
        """One vector of ``(workers, d)``."""


class Mean(_Combined):
    """The mean: synchronous SGD, or local SGD, through a server. One hostile worker decides everything."""

    def combine(self, updates: Tensor) -> Tensor:
        return updates.mean(0)


class Median(_Combined):
    """The median of every coordinate; of an even number of values the mean of the middle two.

    Bears fewer hostile workers than half. Source: Yin et al., "Byzantine-Robust Distributed Learning"
    (ICML 2018), arXiv 1803.01498.
    """

    def combine(self, updates: Tensor) -> Tensor:
        ordered = updates.sort(dim=0).values
        count = len(updates)
        return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


class TrimmedMean(_Combined):
    """The mean of every coordinate without its ``trim`` lowest and highest values.

    Bears ``trim`` hostile workers, fewer than half of all. Source: as for `Median`.
    """

    @given_numbers
    def __init__(self, trim: int) -> None:
        check("TrimmedMean", trim=(trim >= 0, "at least 0", trim))
        self._trim, self.least = trim, 2 * trim + 1

    def combine(self, updates: Tensor) -> Tensor:
        return updates.sort(dim=0).values[self._trim : len(updates) - self._trim].mean(0)
