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

from hvd_sketch.native import sources

ABI = 4
"""Of the functions below; raised together with ``kernel_abi`` in ``identity.cpp``."""

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
    "hadamard_transform": [_pointer, *[_int64] * 6],
    "stage_gradient": [_pointer, _pointer, _int64, ctypes.c_float, _int64, _int64],
}


@functools.cache
def _load() -> ctypes.CDLL | None:
    candidates = (Path(__file__).with_name(f"_kernel{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in candidates if path.exists()), None)
    found = None if path is None else ctypes.CDLL(str(path))
    problem = "is not built" if found is None else _problem(found)
    if found is None or problem is not None:
        logging.getLogger(__name__).warning(
            "hvd_sketch: the native kernel %s; the reference serves in its place, many times slower. To build it, "
            "install a C++ compiler and run `pip install --no-build-isolation .` again, with -e if it was so",
            problem,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        getattr(found, name).argtypes = arguments
    found.stage_gradient.restype = ctypes.c_double
    return found


def _problem(found: ctypes.CDLL) -> str | None:
    """Why a library is not the kernel that is meant, or None: another would give wrong numbers in silence."""
    try:
        found.kernel_sources.restype = ctypes.c_char_p
        abi, built_from = found.kernel_abi(), found.kernel_sources().decode()
    except AttributeError:
        return f"in {found._name} is older than this package"
    if abi != ABI:
        return f"in {found._name} has ABI {abi}, and this package needs {ABI}"
    if sources.files() and built_from != sources.digest():
        return f"in {found._name} was built from other sources than those beside it"
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
    """What ranks compare: the sources of the kernel that works here, or that the reference does in its place."""
    return str(library().kernel_sources().decode()) if available() else "reference"


def serves(tensor: Tensor) -> bool:
    """Whether the kernel can work on this tensor: it is in the processor's memory, and the kernel is built."""
    return tensor.device.type == "cpu" and available()


def serves_floats(tensor: Tensor) -> bool:
    """Whether it can work on this tensor as one run of float32."""
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and serves(tensor)


def address(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """Where these values lie, for the kernel, which cannot see what it is given.

    Raises:
        ValueError: unless they are so many, of this type, contiguous and in the processor's memory.
    """
    if tensor.dtype != dtype or tensor.numel() != count or tensor.device.type != "cpu" or not tensor.is_contiguous():
        strides = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
        raise ValueError(
            f"hvd_sketch: the native kernel needs {count} contiguous values of {dtype} in the processor's memory, "
            f"got {tensor.numel()} of {tensor.dtype} on {tensor.device}, {strides}"
        )
    return tensor.data_ptr()


def pieces(tensors: Mapping[int, Tensor]) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """Stretches of a vector for the kernel: contiguous float32 tensors by the coordinate of their first element."""
    numbers: list[int] = []
    for start, piece in tensors.items():
        numbers += (address(piece, torch.float32, piece.numel()), start, piece.numel())
    return (_int64 * len(numbers))(*numbers), len(tensors)
