"""The native code for processors: one shared library with a C interface, linked against neither Python nor PyTorch.

Each function equals a reference in Python, which serves in its place where the library is not built.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p
_SKETCH = [_int64, _int64, ctypes.c_uint64, _pointer]
_PIECES = [_pointer, _int64]
_SCATTER = [*_PIECES, *[_int64] * 5, _pointer, _pointer]
_SIGNATURES = {
    "sketch_add": [*_SKETCH, _pointer, _int64, ctypes.c_float, _int64],
    "sketch_advance": [*_SKETCH, _int64, *[_pointer] * 2, ctypes.c_float, _pointer, *[_int64] * 3, _pointer, _int64],
    "sketch_estimate_all": [*_SKETCH, _int64, _pointer, _int64],
    "sketch_top_k": [*_SKETCH, _int64, _int64, _pointer, _pointer, _int64],
    "sketch_limit_lanes": [_int64],
    "sparse_heaviest": [_pointer, *[_int64] * 4, _pointer, _pointer, _int64],
    "sparse_encode": [*[_int64] * 3, *[_pointer] * 4, _int64],
    "sparse_decode": [*[_int64] * 3, *[_pointer] * 4, _int64],
    "sparse_keep": [*_PIECES, _pointer, *[_int64] * 3, _pointer, _int64],
    "sparse_put": [*_SCATTER, _int64],
    "sparse_add": _SCATTER,
    "stage_gradient": [_pointer, _pointer, _int64, ctypes.c_float, _int64, _int64],
}


@functools.cache
def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernel{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
            library.stage_gradient.restype = ctypes.c_double
            return library
    logging.getLogger(__name__).warning(
        "hvd_sketch: the native kernel is not built; the reference serves in its place, many times slower. "
        "To build it, install a C++ compiler and run `pip install --no-build-isolation .` again"
    )
    return None


def library() -> ctypes.CDLL:
    """The functions of the kernel, to be called with numbers and raw pointers.

    Raises:
        RuntimeError: when it is not built.
    """
    loaded = _load()
    if loaded is None:
        raise RuntimeError("the native kernel is not built")
    return loaded


def available() -> bool:
    """Whether the kernel is built; if not, the first call logs a warning."""
    return _load() is not None


def identity() -> str:
    """What ranks compare: whether the kernel works here, or the reference in its place."""
    return "native" if available() else "reference"


def serves(tensor: Tensor) -> bool:
    """Whether the kernel can work on this tensor: it is in the processor's memory, and the kernel is built."""
    return tensor.device.type == "cpu" and available()


def serves_floats(tensor: Tensor) -> bool:
    """Whether it can work on this tensor as one run of float32."""
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and serves(tensor)


def pieces(tensors: Mapping[int, Tensor]) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """Stretches of a vector for the kernel: contiguous float32 tensors by the coordinate of their first element."""
    numbers = [number for start, piece in tensors.items() for number in (piece.data_ptr(), start, piece.numel())]
    return (_int64 * len(numbers))(*numbers), len(tensors)
