"""Matrix products in full float32, whatever the user allows for the training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: Any = None


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products of float32 matrices round as float32 does, not as TF32 or bfloat16.

    The setting is one for the whole process: the first thread that enters changes it, the last one that leaves
    restores it.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _set(None)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(_before)


def _set(to: Any) -> Any:
    """Set what was returned before, or full precision; returns what it was until then."""
    matmuls: list[Any] = [torch.backends.cuda.matmul]
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    if mkldnn is not None:
        matmuls.append(mkldnn)
    if not hasattr(matmuls[0], "fp32_precision"):  # PyTorch before 2.9
        was: Any = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(to or "highest")
        return was
    was = [matmul.fp32_precision for matmul in matmuls]
    for matmul, precision in zip(matmuls, to or ["ieee"] * len(matmuls), strict=True):
        matmul.fp32_precision = precision
    return was
