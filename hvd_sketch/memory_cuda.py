"""Adding to the memory on the GPU, by a factor that only the GPU knows."""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 2048


def add(values: Tensor, gradient: Tensor, gain: float, clip: Tensor) -> None:
    """``values += gain * clip * gradient`` with one rounding; float32, contiguous, and clip one number."""
    total = values.numel()
    if total:
        with torch.cuda.device_of(values):
            add_fused[-(-total // _LANES),](values, gradient, clip, gain, total, lanes=_LANES)


@triton.jit(do_not_specialize=["total"])
def add_fused(
    values: tl.tensor, gradient: tl.tensor, clip: tl.tensor, gain: tl.float32, total: tl.int64, lanes: tl.constexpr
):
    """Grid: cdiv(total, lanes)."""
    at = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    inside = at < total
    scale = tl.load(clip) * gain
    value = tl.load(values + at, mask=inside, other=0.0)
    change = tl.load(gradient + at, mask=inside, other=0.0)
    tl.store(values + at, tl.fma(change, scale, value), mask=inside)
