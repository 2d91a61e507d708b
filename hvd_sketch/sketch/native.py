"""The CPU kernel: a binding of ``kernel.cpp`` by raw pointers, not linked against PyTorch.

Same functions and, for tables without NaN, same results to the last bit as `hvd_sketch.sketch.reference`,
whatever the number of threads; it uses ``torch.get_num_threads()`` of them, as of the time of the call.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from hvd_sketch.sketch.geometry import Geometry

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p
_SKETCH = [_int64, _int64, ctypes.c_uint64, _pointer]
_SIGNATURES = {
    "sketch_add": [*_SKETCH, _pointer, _int64, ctypes.c_float, _int64],
    "sketch_estimate_all": [*_SKETCH, _int64, _pointer, _int64],
    "sketch_top_k": [*_SKETCH, _int64, _int64, _pointer, _pointer, _int64],
    "sketch_limit_lanes": [_int64],
}


@functools.cache
def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernel{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
            return library
    logging.getLogger(__name__).warning(
        "hvd_sketch: the native kernel is not built; the reference serves in its place, many times slower. "
        "To build it, install a C++ compiler and run `pip install --no-build-isolation .` again"
    )
    return None


def available() -> bool:
    """Whether the kernel is built; if not, the first call logs a warning."""
    return _load() is not None


def _library() -> ctypes.CDLL:
    library = _load()
    if library is None:
        raise RuntimeError("the native kernel is not built")
    return library


def add(geometry: Geometry, seed: int, table: Tensor, vector: Tensor, offset: int, scale: float) -> None:
    """As `reference.add`; ``vector`` is contiguous, of dtype float32, float16 or bfloat16."""
    segment = (vector.data_ptr(), _DTYPES[vector.dtype], offset, vector.numel())
    _add_segments(geometry, seed, table, segment, scale)


def add_many(
    geometry: Geometry, seed: int, table: Tensor, vectors: Sequence[Tensor], offsets: Sequence[int], scale: float
) -> None:
    """As `add` of each vector at its offset. The slices are in ascending order, without overlap."""
    segments: list[int] = []
    for vector, offset in zip(vectors, offsets, strict=True):
        segments += (vector.data_ptr(), _DTYPES[vector.dtype], offset, vector.numel())
    _add_segments(geometry, seed, table, segments, scale)


def _add_segments(geometry: Geometry, seed: int, table: Tensor, segments: Sequence[int], scale: float) -> None:
    _library().sketch_add(
        geometry.rows,
        geometry.cols,
        seed,
        table.data_ptr(),
        (_int64 * len(segments))(*segments),
        len(segments) // 4,
        scale,
        torch.get_num_threads(),
    )


def estimate_all(geometry: Geometry, seed: int, table: Tensor) -> Tensor:
    """The estimates (float32) of all ``geometry.dim`` coordinates."""
    estimates = torch.empty(geometry.dim, dtype=torch.float32)
    _library().sketch_estimate_all(
        geometry.rows,
        geometry.cols,
        seed,
        table.data_ptr(),
        geometry.dim,
        estimates.data_ptr(),
        torch.get_num_threads(),
    )
    return estimates


def top_k(geometry: Geometry, seed: int, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.top_k`, in memory of O(k) and a tile beyond the table."""
    indices, estimates = torch.empty(k, dtype=torch.int64), torch.empty(k, dtype=torch.float32)
    _library().sketch_top_k(
        geometry.rows,
        geometry.cols,
        seed,
        table.data_ptr(),
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
    return int(_library().sketch_limit_lanes(most))
