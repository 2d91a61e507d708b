"""The CPU kernel: a binding of ``native/sketch.cpp`` by raw pointers.

Same functions and, for tables without NaN, same results to the last bit as `hvd_sketch.sketch.reference`,
whatever the number of threads; it uses ``torch.get_num_threads()`` of them, as of the time of the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_sketch.native import address, available, library
from hvd_sketch.sketch.geometry import Geometry
from hvd_sketch.sparse.chosen import Chosen

__all__ = ["add", "add_advanced", "add_many", "available", "estimate_all", "limit_lanes", "top_k"]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def add(geometry: Geometry, seed: int, table: Tensor, vector: Tensor, offset: int, scale: float) -> None:
    """As `reference.add`; ``vector`` is contiguous, of dtype float32, float16 or bfloat16."""
    _add_segments(geometry, seed, table, _segment(vector, offset), scale)


def add_many(
    geometry: Geometry, seed: int, table: Tensor, vectors: Sequence[Tensor], offsets: Sequence[int], scale: float
) -> None:
    """As `add` of each vector at its offset. The slices are in ascending order, without overlap."""
    segments: list[int] = []
    for vector, offset in zip(vectors, offsets, strict=True):
        segments += _segment(vector, offset)
    _add_segments(geometry, seed, table, segments, scale)


def _segment(vector: Tensor, offset: int) -> tuple[int, int, int, int]:
    count = vector.numel()
    return address(vector, vector.dtype, count), _DTYPES[vector.dtype], offset, count


def _table(geometry: Geometry, table: Tensor) -> int:
    return address(table, torch.float32, geometry.rows * geometry.cols)


def _add_segments(geometry: Geometry, seed: int, table: Tensor, segments: Sequence[int], scale: float) -> None:
    library().sketch_add(
        geometry.rows,
        geometry.cols,
        seed,
        _table(geometry, table),
        (ctypes.c_int64 * len(segments))(*segments),
        len(segments) // 4,
        scale,
        torch.get_num_threads(),
    )


def add_advanced(
    geometry: Geometry,
    seed: int,
    table: Tensor,
    vector: Tensor,
    scaled: tuple[Tensor, float],
    kept: Chosen,
    values: Tensor,
) -> None:
    """As `CountSketch.add_advanced`, tile by tile; ``scaled`` is the change and its scale."""
    change, scale = scaled
    library().sketch_advance(
        geometry.rows,
        geometry.cols,
        seed,
        _table(geometry, table),
        geometry.dim,
        address(vector, torch.float32, geometry.dim),
        address(change, torch.float32, geometry.dim),
        scale,
        address(kept.indices, torch.int64, kept.indices.numel()),
        kept.indices.numel(),
        kept.comb.start or 0,
        kept.comb.step or 0,
        address(values, torch.float32, kept.count),
        torch.get_num_threads(),
    )


def estimate_all(geometry: Geometry, seed: int, table: Tensor) -> Tensor:
    """The estimates (float32) of all ``geometry.dim`` coordinates."""
    estimates = torch.empty(geometry.dim, dtype=torch.float32, device="cpu")
    library().sketch_estimate_all(
        geometry.rows,
        geometry.cols,
        seed,
        _table(geometry, table),
        geometry.dim,
        estimates.data_ptr(),
        torch.get_num_threads(),
    )
    return estimates


def top_k(geometry: Geometry, seed: int, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.top_k`, in memory of O(k) and a tile beyond the table."""
    indices, estimates = (
        torch.empty(k, dtype=torch.int64, device="cpu"),
        torch.empty(k, dtype=torch.float32, device="cpu"),
    )
    library().sketch_top_k(
        geometry.rows,
        geometry.cols,
        seed,
        _table(geometry, table),
        geometry.dim,
        k,
        indices.data_ptr(),
        estimates.data_ptr(),
        torch.get_num_threads(),
    )
    return indices, estimates


def limit_lanes(most: int) -> int:
    """Take the widest instruction set with at most ``most`` lanes of 32 bits; returns how many it has.

    The results do not depend on it, so this is of use to tests and measurements only.
    """
    return int(library().sketch_limit_lanes(most))
