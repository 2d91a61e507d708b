"""The Count Sketch in plain PyTorch: the oracle that every kernel is tested against.

Runs on any device; made to be read, not to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.sketch.geometry import Geometry, cells_and_signs

_AT_ONCE = 2**20
"""Coordinates that are hashed together, in memory for some vectors of as many."""


def add(geometry: Geometry, seed: int, table: Tensor, vector: Tensor, offset: int, scale: float) -> None:
    """``table[j, cell_j(i)] += sign_j(i) * scale * vector[i - offset]`` for every i and row j.

    A cell receives its coordinates in ascending order, one block after the other, so the
    floating-point result is defined to the last bit.
    """
    for start in range(0, vector.numel(), _AT_ONCE):
        _add(geometry, seed, table, vector[start : start + _AT_ONCE], offset + start, scale)


def _add(geometry: Geometry, seed: int, table: Tensor, vector: Tensor, offset: int, scale: float) -> None:
    cell, sign = cells_and_signs(geometry, seed, torch.arange(offset, offset + vector.numel(), device=table.device))
    values = sign * (vector.to(torch.float32) * scale)
    flat = table.view(-1)
    row_start = torch.arange(geometry.rows, device=table.device).unsqueeze(1) * geometry.cols
    edges = tuple(range(geometry.block - offset % geometry.block, vector.numel(), geometry.block))
    blocks = (each.tensor_split(edges, dim=1) for each in (row_start + cell, values))
    for places, terms in zip(*blocks, strict=True):
        flat.index_add_(0, places.reshape(-1), terms.reshape(-1))


def estimate(geometry: Geometry, seed: int, table: Tensor, index: Tensor) -> Tensor:
    """``median_j sign_j(i) * table[j, cell_j(i)]`` (float32) for each coordinate of ``index``.

    With an even number of rows the median is the mean of the two middle values.
    """
    cell, sign = cells_and_signs(geometry, seed, index)
    ordered = (table.gather(1, cell) * sign).sort(dim=0, stable=True).values
    middle = geometry.rows // 2
    if geometry.rows % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) * 0.5


def top_k(geometry: Geometry, seed: int, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k coordinates of largest absolute estimate, ties to the smaller index.

    Returns the indices (int64, ascending) and their estimates (float32).
    """
    estimates = estimate(geometry, seed, table, torch.arange(geometry.dim, device=table.device))
    order = torch.sort(estimates.abs(), descending=True, stable=True).indices[:k]
    chosen = order.sort().values
    return chosen, estimates[chosen]
