"""The methods compared, and which of them exist at which ratio."""

from __future__ import annotations

from collections.abc import Callable

from hvd_sketch import Compression
from hvd_sketch.compressor import Compressor

Maker = Callable[[float, int], Compressor]
"""Makes a compressor from a ratio and the number of warm-up steps."""

METHODS: dict[str, Maker] = {
    "sketch": lambda ratio, warmup: Compression.sketch(ratio=ratio, warmup_steps=warmup),
    "topk": lambda ratio, warmup: Compression.topk(ratio=ratio, warmup_steps=warmup),
    "sharded": lambda ratio, warmup: Compression.sharded(ratio=ratio, warmup_steps=warmup),
}

POWERSGD_RANKS = (8, 4, 2, 1)
"""PowerSGD's ratio follows from its rank; its rows carry the ratio that came out."""


def powersgd(rank: int, warmup: int) -> Compressor:
    """PowerSGD of a rank, dense for the warm-up steps, clipped like the others."""
    return Compression.powersgd(rank=rank, start_step=warmup)
