"""The one table of compressors, over which every law of the exchanges runs: a new one is tested by a line here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from hvd_sketch import Compression, TensorTopK
from hvd_sketch.compressors import Compressor, PowerSGD, Sign, Sparsifier
from tests.support.simulation import Run, lost, rounding

TOTAL, COMPRESSED = 5470, 5400
PLAIN: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None}
SINGLE = Compression.sketch(ratio=10.0, half=False, **PLAIN)
HALF = Compression.sketch(ratio=10.0, oversampling=2.0, **PLAIN)
BUCKETS = Compression.sketch(ratio=10.0, buckets=5, **PLAIN)
IN_TURN = Compression.sketch(ratio=10.0, in_turn=0.75, oversampling=2.0, buckets=2, **PLAIN)
TOPK = Compression.topk(ratio=10.0, **PLAIN)
SHARDED = Compression.sharded(ratio=10.0, **PLAIN)
POWERSGD = Compression.powersgd(rank=1, start_step=2, clip_norm=None)
EVERYTHING = Compression.sketch(cols=COMPRESSED, k=COMPRESSED, half=False, **PLAIN)
TABLE: dict[str, Compressor] = {
    "sketch": SINGLE,
    "sketch, half": HALF,
    "sketch, five rows": Compression.sketch(rows=5, cols=200, k=300, clip_norm=None),
    "sketch, buckets": BUCKETS,
    "sketch, in turn": IN_TURN,
    "topk": TOPK,
    "topk, by tensor": TensorTopK(ratio=10.0, **PLAIN),
    "sharded": SHARDED,
    "sharded, dense part": replace(SHARDED, dense_below=1024, half=False),
    "sharded, buckets": replace(SHARDED, buckets=3),
    "auto": Compression.auto(ratio=10.0, **PLAIN),
    "stride": Compression.stride(ratio=10.0, **PLAIN),
    "sign": Compression.sign(clip_norm=None),
    "sign, one way": Compression.sign(both_ways=False, dense_below=0, clip_norm=None),
    "powersgd": POWERSGD,
    "powersgd, four bits": replace(POWERSGD, factor_bits=4),
}
EVERY = pytest.mark.parametrize("compressor", TABLE.values(), ids=TABLE)
WHOLE = {name: member for name, member in TABLE.items() if name not in ("sketch, buckets", "sketch, in turn")}
"""Those that send nothing before the whole gradient is there; the others clip by the norm of what is."""
AT_ONCE = pytest.mark.parametrize("compressor", WHOLE.values(), ids=WHOLE)
SIZES = pytest.mark.parametrize("size", [1, 2, 4])


def at_ratio_one(compressor: Compressor) -> Compressor:
    """The same, sending everything in every step."""
    if isinstance(compressor, Sparsifier):
        by_hand: dict[str, Any] = {name: None for name in ("cols", "k") if hasattr(compressor, name)}
        return replace(compressor, ratio=1.0, schedule=None, **by_hand)
    assert isinstance(compressor, PowerSGD | Sign)
    return replace(compressor, start_step=1000)


def conserved(runs: list[Run], gradients: Tensor) -> bool:
    """Whether applied and kept add up to what was computed, to a millionth of what went in and what came out."""
    missing = lost(gradients, runs[0].updates, [run.residual for run in runs])
    applied = len(runs) * runs[0].updates
    return bool((missing <= rounding(gradients) + rounding(applied[None])).all())
