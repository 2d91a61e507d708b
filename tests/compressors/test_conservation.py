"""What was sent plus what is kept is what was computed, to float32 rounding, over three hundred steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.compressors import Compressor
from tests.support.compressors import IN_TURN, PLAIN, TABLE, TOTAL
from tests.support.simulation import heavy_tailed, lost, simulate

STEPS = 300
FEW, SMALL = 1220, {"bias": (20,), "weight": (30, 40)}
DEFAULTS: dict[str, Compressor] = {
    f"{member.__name__.lower()}, by default": member(dense_below=100, clip_norm=None)
    for member in (Compression.auto, Compression.sketch, Compression.topk, Compression.sharded)
}
LOW: dict[str, Compressor] = {
    f"sharded, ratio {ratio}": Compression.sharded(ratio=ratio, dense_below=100, **PLAIN) for ratio in (1.1, 1.5, 3.0)
}
EVERY = TABLE | DEFAULTS | LOW
HALVES: dict[str, Compressor] = {
    "sketch": Compression.sketch(ratio=4.0, dense_below=100, oversampling=2.0, **PLAIN),
    "sketch, in turn": replace(IN_TURN, ratio=4.0, dense_below=100, buckets=1),
    "topk": Compression.topk(ratio=1.5, dense_below=100, **PLAIN),
    "sharded": Compression.sharded(ratio=1.1, dense_below=100, **PLAIN),
}
"""Those that send halves, at ratios that a small vector allows."""

pytestmark = pytest.mark.slow


def share_lost(compressor: Compressor, gradients: Tensor, *args: Any) -> float:
    """The sum of what is missing over the sum of magnitudes."""
    runs = simulate(compressor, gradients, *args)
    missing = lost(gradients, runs[0].updates, [run.residual for run in runs])
    return float(missing.sum() / gradients.double().abs().sum())


@pytest.mark.parametrize("compressor", EVERY.values(), ids=EVERY)
def test_on_two_ranks(compressor: Compressor) -> None:
    assert share_lost(compressor, heavy_tailed(2, STEPS, TOTAL)) <= 1e-6


@pytest.mark.parametrize("compressor", HALVES.values(), ids=HALVES)
def test_on_eight_ranks_with_and_without_halves(compressor: Any) -> None:
    gradients = heavy_tailed(8, STEPS, FEW)
    assert share_lost(compressor, gradients, SMALL) <= 1e-6
    assert share_lost(replace(compressor, half=False), gradients[:, :30], SMALL) <= 1e-6


@pytest.mark.parametrize("compressor", HALVES.values(), ids=HALVES)
def test_on_64_ranks(compressor: Compressor) -> None:
    steps = STEPS if compressor is HALVES["sketch, in turn"] else 30
    assert share_lost(compressor, heavy_tailed(64, steps, FEW), SMALL) <= 1e-6
