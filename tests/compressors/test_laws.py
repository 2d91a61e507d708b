"""Laws that every compressor keeps: nothing is lost, all ranks get the same, its settings count, nothing else does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hvd_sketch.compressors import Compressor, PowerSGD, Sharded, Sign
from hvd_sketch.exchange import Exchange
from hvd_sketch.layout import Layout
from tests.support.compressors import AT_ONCE, EVERY, SIZES, TOTAL, conserved
from tests.support.simulation import heavy_tailed, simulate


@EVERY
@SIZES
def test_applied_plus_kept_is_computed(compressor: Compressor, size: int) -> None:
    gradients = heavy_tailed(size, 25, TOTAL)
    runs = simulate(compressor, gradients)
    assert conserved(runs, gradients)
    assert all(run.residual.any() for run in runs)


@EVERY
@SIZES
def test_all_ranks_get_the_same_bits(compressor: Compressor, size: int) -> None:
    runs = simulate(compressor, heavy_tailed(size, 10, TOTAL))
    assert all(torch.equal(run.updates, runs[0].updates) for run in runs)
    assert int(runs[0].updates[-1].count_nonzero()) > 0
    assert isinstance(compressor, PowerSGD | Sign) or int(runs[0].updates[-1].count_nonzero()) < TOTAL // 2


@AT_ONCE
def test_gradients_are_clipped_to_the_norm_before_the_memory(compressor: Compressor) -> None:
    gradients = heavy_tailed(2, 10, TOTAL)
    gradients[0] *= 1e-3
    norms = gradients.norm(dim=2, keepdim=True)
    limit = float(norms[1].median())
    clipped = gradients * (limit / norms).clamp(max=1.0)
    with_clip = replace(compressor, clip_norm=limit)
    factors: list[tuple[float, ...]] = [(), ()]

    def note(exchange: Exchange, number: int) -> None:
        if number:
            factors[exchange.comm.rank] += (exchange.stats.clip,)

    runs = simulate(with_clip, gradients, before_step=note)
    assert conserved(runs, clipped)
    assert factors[0] == (1.0,) * 9
    assert factors[1] == pytest.approx((limit / norms[1]).clamp(max=1.0).flatten().tolist()[:9], rel=1e-5)


@EVERY
def test_another_seed_draws_otherwise(compressor: Compressor) -> None:
    if not hasattr(compressor, "seed"):
        pytest.skip("it draws nothing")
    gradients = heavy_tailed(2, 6, TOTAL)
    seeds: list[Any] = [{"seed": seed} for seed in (3, 3, 4)]
    first, same, other = (simulate(replace(compressor, **seed), gradients)[0].updates for seed in seeds)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@EVERY
def test_every_default_dtype_will_do(compressor: Compressor) -> None:
    gradients = heavy_tailed(2, 4, TOTAL)
    expected = simulate(compressor, gradients)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(simulate(compressor, gradients)[0].updates, expected[0].updates)
        finally:
            torch.set_default_dtype(torch.float32)


def test_sizes_are_fitted_once_for_a_ratio_and_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float, int]] = []
    fit = Sharded.fit

    def counted(self: Sharded, layout: Layout, ratio: float, ranks: int) -> Any:
        asked.append((layout.total, ratio, ranks))
        return fit(self, layout, ratio, ranks)

    monkeypatch.setattr(Sharded, "fit", counted)
    compressor = Sharded(schedule=lambda step: 10.0 if step < 6 else 20.0)
    layouts = [compressor.layout([("w", torch.zeros(side, 100))]) for side in (100, 200)]
    for step in range(8):
        for layout in layouts:
            ratio = compressor.ratio_at(step)
            assert compressor.plan(layout, step, 4) == fit(compressor, layout, ratio, 4)
    assert asked == [(10_000, 10.0, 4), (20_000, 10.0, 4), (10_000, 20.0, 4), (20_000, 20.0, 4)]
    assert compressor.plan(layouts[0], 0, 2) == fit(compressor, layouts[0], 10.0, 2)
