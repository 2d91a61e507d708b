"""Rules and attacks beside ByzFL's, of the extra ``oracles``.

Its Krum of f counts n - f - 1 neighbours, where the published one counts n - f - 2, so it stands for f - 1 hostile
workers; its ALIE takes the deviation of a sample, where the published one takes the population's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.methods.server import Krum, Mean, Median, MultiKrum, Rule, TrimmedMean
from hvd_sketch.methods.server.attacks import ALittleIsEnough, InnerProduct
from tests.methods.server.support import after_round

byzfl = pytest.importorskip("byzfl")
WORKERS, HOSTILE, Z = 11, 3, 0.8


def rows(seed: int) -> Tensor:
    """Of a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(WORKERS, 30, generator=generator, dtype=torch.float64)
    return normal / torch.rand(WORKERS, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "oracle"),
    [
        (lambda: Mean(), lambda: byzfl.Average()),
        (lambda: TrimmedMean(HOSTILE), lambda: byzfl.TrMean(HOSTILE)),
        (lambda: Median(), lambda: byzfl.Median()),
        (lambda: Krum(HOSTILE), lambda: byzfl.Krum(HOSTILE + 1)),
        (lambda: MultiKrum(HOSTILE, WORKERS - HOSTILE - 1), lambda: byzfl.MultiKrum(HOSTILE + 1)),
    ],
    ids=["mean", "trimmed mean", "median", "krum", "multi-krum"],
)
def test_rules(rule: Callable[[], Rule], oracle: Callable[[], Any]) -> None:
    for seed in range(20):
        assert_equal(after_round(rule(), rows(seed)), oracle()(rows(seed).numpy()))


@pytest.mark.parametrize(
    ("attack", "oracle"),
    [
        (lambda honest: InnerProduct(lambda: honest, 0.5), lambda: byzfl.InnerProductManipulation(0.5)),
        (
            lambda honest: ALittleIsEnough(lambda: honest, Z),
            lambda: byzfl.ALittleIsEnough(-Z * math.sqrt((WORKERS - 1) / WORKERS)),
        ),
    ],
    ids=["inner product", "a little is enough"],
)
def test_attacks(attack: Callable[[Tensor], Callable[[Tensor], Tensor]], oracle: Callable[[], Any]) -> None:
    for seed in range(20):
        honest = rows(seed)
        assert_equal(attack(honest)(honest[0]), oracle()(honest.numpy()))


def assert_equal(ours: Tensor, theirs: Any) -> None:
    """But for rounding; with arrays, because it turns tensors into float32."""
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-12, atol=1e-12)
