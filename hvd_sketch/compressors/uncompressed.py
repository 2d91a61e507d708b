"""Horovod's own compressors, which keep every coordinate."""

from __future__ import annotations

import torch
from torch import Tensor


class NoCompression:
    """Send gradients as they are; the same as Horovod's own ``Compression.none``."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, None]:
        """Return the tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: None) -> Tensor:
        """Return the tensor itself."""
        return tensor


class HalfPrecision:
    """Send floating-point gradients as float16; the same as Horovod's own ``Compression.fp16``."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype]:
        """Cast to float16; other dtypes pass."""
        return (tensor.half() if tensor.dtype.is_floating_point else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype) -> Tensor:
        """Cast back to the dtype that came in."""
        return tensor.to(ctx) if ctx.is_floating_point else tensor
