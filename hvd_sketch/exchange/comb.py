"""Coordinates at equal distances, whose turn it is, and others beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TURNS = 1_000_003


def comb(size: int, stride: int, step: int, seed: int) -> slice:
    """Every ``stride``-th of ``size`` coordinates, from an offset drawn by (seed, step); none for stride 0.

    The offsets of ``stride`` steps in a row, counted from a multiple of it, are a permutation, so every coordinate
    has its turn within ``2 stride - 1`` steps.
    """
    if stride == 0:
        return slice(0)
    turn, position = divmod(step, stride)
    generator = torch.Generator().manual_seed(seed * _TURNS + turn)  # it takes the lower 32 bits
    offset = int(torch.randperm(stride, generator=generator)[position])
    return slice(offset, size, stride)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Coordinates of a vector: some by index (int64), then a comb; of one that is in both the comb's value counts."""

    indices: Tensor
    teeth: slice

    def at(self, vector: Tensor) -> Tensor:
        """The values of a vector there."""
        return torch.cat([vector.index_select(0, self.indices), vector[self.teeth]])

    def put(self, vector: Tensor, values: Tensor | float) -> None:
        """Set these entries of a vector."""
        if isinstance(values, Tensor):
            few = self.indices.numel()
            vector.index_copy_(0, self.indices, values[:few])
            vector[self.teeth] = values[few:]
        else:
            vector.index_fill_(0, self.indices, values)
            vector[self.teeth] = values
