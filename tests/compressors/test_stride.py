"""The random comb: every coordinate in its turn, nothing lost, the bytes that were asked for."""

from __future__ import annotations

import pytest
import torch

from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import SingleProcess
from tests.support.compressors import COMPRESSED, PLAIN, TOTAL
from tests.support.simulation import UNIT_ROUNDOFF, heavy_tailed, make, simulate


@pytest.mark.parametrize("size", [1, 2, 4])
def test_applied_plus_kept_is_computed_and_all_ranks_get_the_same_bits(size: int) -> None:
    gradients = heavy_tailed(size, 25, TOTAL)
    runs = simulate(Compression.stride(ratio=10.0, **PLAIN), gradients)
    assert all(torch.equal(run.updates, runs[0].updates) for run in runs)
    kept = torch.stack([run.residual.double() for run in runs]).sum(0)
    lost = gradients.double().sum((0, 1)) - runs[0].updates.double().sum(0) * size - kept
    assert (lost.abs() <= 25 * (size + 6) * UNIT_ROUNDOFF * gradients.double().abs().sum((0, 1))).all()


def test_every_coordinate_is_sent_once_in_a_turn() -> None:
    gradients = torch.ones(1, 26, TOTAL)
    sent = simulate(Compression.stride(ratio=10.0, **PLAIN), gradients)[0].updates[:, :COMPRESSED] != 0
    stride = round(COMPRESSED / int(sent[0].sum()))
    for turn in range(26 // stride):
        assert (sent[turn * stride : (turn + 1) * stride].sum(0) == 1).all()


def test_another_seed_is_another_comb() -> None:
    gradients = torch.ones(1, 8, TOTAL)
    updates = [simulate(Compression.stride(ratio=10.0, seed=seed, **PLAIN), gradients)[0].updates for seed in (0, 1)]
    assert not torch.equal(*updates)


@pytest.mark.parametrize("ratio", [2.0, 10.0, 30.0])
def test_it_sends_no_more_than_asked_for(ratio: float) -> None:
    runs = simulate(Compression.stride(ratio=ratio, **PLAIN), heavy_tailed(2, 300, TOTAL))
    next_stride = 1.0 + 1.0 / (ratio - 1.0)  # the stride is a whole number
    assert ratio <= runs[0].exchange.stats.ratio * 1.02
    assert runs[0].exchange.stats.ratio <= ratio * next_stride * 1.02


def test_a_ratio_out_of_reach_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="cannot be reached"):
        make(Compression.stride(ratio=500.0), SingleProcess())
