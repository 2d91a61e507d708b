"""Shards of a vector: of W shards, entry i belongs to number ``i mod W``, as its row ``i div W``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch import native


@dataclass(frozen=True, eq=False)
class Rows:
    """Chosen rows of some shards: ``rows[j]`` (int64, contiguous, ascending) are of shard ``first + j``.

    Vectors to write to are contiguous and float32, values are of the shape of ``rows``, ``(shards chosen, count)``.
    """

    shards: int
    first: int
    rows: Tensor

    def put(self, vector: Tensor, values: Tensor | float) -> None:
        """Set these entries of a vector."""
        if not isinstance(values, Tensor):
            values = vector.new_full(self.rows.shape, values)
        if native.serves(vector):
            _scatter("sparse_put", vector, self.shards, self.first, 1, self.rows, values)
            return
        owners = torch.arange(self.first, self.first + len(self.rows), device=self.rows.device).unsqueeze(1)
        vector.index_copy_(0, (self.rows * self.shards + owners).flatten(), values.flatten())


def add(vector: Tensor, shards: int, shard: int, rows: Tensor, values: Tensor) -> None:
    """Add lists of values to rows of one shard, one list after the other; both ``(lists, count)``, rows ascending."""
    if native.serves(vector):
        _scatter("sparse_add", vector, shards, shard, 0, rows, values)
        return
    for chosen, added in zip(rows, values, strict=True):
        vector[shard::shards].index_add_(0, chosen, added)


def _scatter(name: str, vector: Tensor, shards: int, first: int, step: int, rows: Tensor, values: Tensor) -> None:
    values = values.contiguous()
    getattr(native.library(), name)(
        vector.data_ptr(),
        vector.numel(),
        shards,
        first,
        step,
        *rows.shape,
        rows.data_ptr(),
        values.data_ptr(),
    )
