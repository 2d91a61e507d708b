"""Whether there are kernels for a GPU, and what those of several algorithms share."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging

import torch
from torch import Tensor

_OLDEST_TRITON = (3, 3)


@functools.cache
def available() -> bool:
    """Whether Triton is there for a GPU of CUDA; if not, the first call logs a warning. Imports Triton if it is."""
    if torch.version.hip is not None:
        missing = "the kernels are for GPUs of NVIDIA, and were never tried on others"
    elif importlib.util.find_spec("triton") is None or _version("triton") < _OLDEST_TRITON:
        missing = (
            "Triton 3.3 or newer is not installed. PyTorch 2.7 for CUDA and newer ones bring it; or run "
            "`pip install 'triton>=3.3,<4'`"
        )
    else:
        return True
    logging.getLogger(__name__).warning(
        "hvd_sketch: the reference serves on the GPU, many times slower and with memory for several vectors: %s",
        missing,
    )
    return False


def serves(tensor: Tensor) -> bool:
    """Whether kernels can work on this tensor: it is on a GPU, and they are available."""
    return tensor.device.type == "cuda" and available()


def find_digit(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The value that the rank-th largest has, by how often each value occurs, and its rank among equal ones.

    ``counts`` are integers of shape ``(lists, values)``; ``rank`` and the results are int64 of shape ``(lists, 1)``,
    ranks from 1. If there are fewer, the value is 0.
    """
    from_top = counts.flip(1).cumsum(1)
    place = torch.searchsorted(from_top, rank).clamp_(max=counts.shape[1] - 1)
    value = counts.shape[1] - 1 - place
    return value, rank - (from_top.gather(1, place) - counts.gather(1, value))


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.import_module(package).__version__.split(".")[:2]))
