"""Places in shards of a vector: of W shards, entry i belongs to number ``i mod W``, as its row ``i div W``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch import gpu, native


@dataclass(frozen=True, eq=False)
class Rows:
    """Chosen rows of some shards: ``rows[j]`` (int64, contiguous, ascending) are of shard ``first + j``.

    Vectors to write to are contiguous and float32, values are of the shape of ``rows``, ``(shards chosen, count)``.
    """

    shards: int
    first: int
    rows: Tensor

    @property
    def numbers(self) -> Tensor:
        """The rows."""
        return self.rows

    def at(self, vector: Tensor) -> Tensor:
        """The values of a vector there."""
        return vector.index_select(0, self._coordinates()).view(self.rows.shape)

    def put(self, vector: Tensor, values: Tensor | float) -> None:
        """Set these entries of a vector."""
        if not isinstance(values, Tensor):
            values = vector.new_full(self.rows.shape, values)
        if native.serves(vector):
            self.put_in_pieces({0: vector}, values, clear=False)
            return
        if gpu.serves(vector):
            _on_gpu().put(vector, self.shards, self.first, self.rows, values.contiguous())
            return
        vector.index_copy_(0, self._coordinates(), values.flatten())

    def put_in_pieces(self, pieces: Mapping[int, Tensor], values: Tensor, *, clear: bool) -> None:
        """Set these entries of a vector of which only pieces are there; see `Places`."""
        values = values.contiguous()
        if gpu.serves(values):
            _on_gpu().put_in_pieces(pieces, self.shards, self.first, self.rows, values, clear=clear)
            return
        native.library().sparse_put(
            *native.pieces(pieces),
            self.shards,
            self.first,
            1,
            *self.rows.shape,
            native.address(self.rows, torch.int64, self.rows.numel()),
            native.address(values, torch.float32, self.rows.numel()),
            clear,
        )

    def _coordinates(self) -> Tensor:
        owners = torch.arange(self.first, self.first + len(self.rows), device=self.rows.device).unsqueeze(1)
        return (self.rows * self.shards + owners).flatten()


def add(vector: Tensor, shards: int, shard: int, rows: Tensor, values: Tensor) -> None:
    """Add lists of values to rows of one shard, one list after the other; both ``(lists, count)``, rows ascending."""
    if native.serves(vector):
        values = values.contiguous()
        native.library().sparse_add(
            *native.pieces({0: vector}),
            shards,
            shard,
            0,
            *rows.shape,
            native.address(rows, torch.int64, rows.numel()),
            native.address(values, torch.float32, rows.numel()),
        )
        return
    if gpu.serves(vector):
        _on_gpu().add(vector, shards, shard, rows, values.contiguous())
        return
    for chosen, added in zip(rows, values, strict=True):
        vector[shard::shards].index_add_(0, chosen, added)


def _on_gpu() -> ModuleType:
    return importlib.import_module("hvd_sketch.sparse.rows_cuda")  # with Triton, which no other device needs
