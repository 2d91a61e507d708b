"""Coordinates of a vector that were chosen: some by index, and a comb."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch.shards import Rows


@dataclass(frozen=True, eq=False)
class Chosen:
    """Coordinates by index (int64, ascending), then a comb; of one that is in both the comb's value counts."""

    indices: Tensor
    teeth: slice

    def at(self, vector: Tensor) -> Tensor:
        """The values of a vector there."""
        return torch.cat([vector.index_select(0, self.indices), vector[self.teeth]])

    def put(self, vector: Tensor, values: Tensor | float) -> None:
        """Set these entries of a vector (contiguous, float32)."""
        if isinstance(values, Tensor):
            few = self.indices.numel()
            Rows(1, 0, self.indices.unsqueeze(0)).put(vector, values[:few].unsqueeze(0))
            vector[self.teeth] = values[few:]
        else:
            Rows(1, 0, self.indices.unsqueeze(0)).put(vector, values)
            vector[self.teeth] = values
