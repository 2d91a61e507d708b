"""The compressors that every test of the exchanges runs with, and what none of them may lose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from hvd_sketch import Compression
from tests.support.simulation import Run, lost, rounding

TOTAL, COMPRESSED = 5470, 5400
PLAIN: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None}
SINGLE = Compression.sketch(ratio=10.0, half=False, **PLAIN)
HALF = Compression.sketch(ratio=10.0, oversampling=2.0, **PLAIN)
TOPK = Compression.topk(ratio=10.0, **PLAIN)
EVERYTHING = Compression.sketch(cols=COMPRESSED, k=COMPRESSED, half=False, **PLAIN)
SHARDED = Compression.sharded(ratio=10.0, **PLAIN)
BUCKETS = Compression.sketch(ratio=10.0, buckets=5, **PLAIN)
IN_TURN = Compression.sketch(ratio=10.0, in_turn=0.75, oversampling=2.0, buckets=2, **PLAIN)
POWERSGD = Compression.powersgd(rank=1, start_step=2, clip_norm=None)
KINDS = {"sketch": SINGLE, "half": HALF, "topk": TOPK, "sharded": SHARDED, "powersgd": POWERSGD}
WHOLE = pytest.mark.parametrize("compressor", KINDS.values(), ids=KINDS)
BOTH = {**KINDS, "buckets": BUCKETS, "in turn": IN_TURN, "sharded buckets": replace(SHARDED, buckets=3)}
SPARSE = pytest.mark.parametrize("compressor", BOTH.values(), ids=BOTH)
SIZES = pytest.mark.parametrize("size", [1, 2, 4])


def conserved(runs: list[Run], gradients: Tensor, *, half: bool) -> bool:
    """Whether what was applied and what is kept add up to what was computed."""
    missing = lost(gradients, runs[0].updates, [run.residual for run in runs])
    return bool((missing <= rounding(gradients, half=half)).all())
