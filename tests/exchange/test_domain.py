"""Exchanges that choose in other coordinates than the model's keep every law, to the rounding of the way there."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.common_share import read_errors
from hvd_sketch.memory import Momentum
from tests.support.compressors import BUCKETS, HALF, PLAIN, POWERSGD, SHARDED, TOPK, TOTAL, at_ratio_one
from tests.support.simulation import Run, heavy_tailed, make, parameters, simulate, step

MEMBERS: dict[str, Compressor] = {
    "sharded, dct": replace(SHARDED, mixing="dct"),
    "sharded, hadamard, by tensor": replace(SHARDED, mixing="hadamard", tensor_power=0.7),
    "sharded, by tensor, dense part": replace(SHARDED, tensor_power=1.0, dense_below=1024),
    "sketch, dct, by tensor": replace(HALF, mixing="dct", tensor_power=0.7),
    "sketch in buckets, hadamard": replace(BUCKETS, mixing="hadamard"),
    "topk, dct, by tensor": replace(TOPK, mixing="dct", tensor_power=0.5),
    "powersgd, dct": replace(POWERSGD, mixing="dct"),
}
EVERY = pytest.mark.parametrize("compressor", MEMBERS.values(), ids=MEMBERS)
STEPS = 26


def by_tensor(vector: Tensor, exchange: Exchange) -> Tensor:
    """The norm of each tensor's part, in float64."""
    parts = vector.double().split([slot.numel for slot in exchange.layout.slots], dim=-1)
    return torch.stack([part.norm(dim=-1) for part in parts])


def is_nothing(missing: Tensor, gradients: Tensor, exchange: Exchange) -> bool:
    """Of every tensor, next to what went in: a transform's rounding is spread over its blocks."""
    given = by_tensor(gradients.double().abs().sum((0, 1)), exchange)
    return bool((by_tensor(missing, exchange) <= 1e-6 * given).all())


def conserved(runs: list[Run], gradients: Tensor) -> bool:
    applied = runs[0].updates.double().sum(0) * len(runs)
    kept = torch.stack([run.residual for run in runs]).double().sum(0)
    return is_nothing(gradients.double().sum((0, 1)) - applied - kept, gradients, runs[0].exchange)


@EVERY
def test_applied_plus_kept_is_computed_and_all_ranks_get_the_same_bits(compressor: Compressor) -> None:
    gradients = heavy_tailed(3, STEPS, TOTAL)
    runs = simulate(compressor, gradients)
    assert all(torch.equal(run.updates, runs[0].updates) for run in runs)
    assert all(run.residual.any() for run in runs)
    assert conserved(runs, gradients)


def test_a_memory_with_momentum_follows_the_scales() -> None:
    """Momentum of everything is momentum of the mean, whatever the scales did meanwhile."""
    gradients, momentum = heavy_tailed(2, 16, TOTAL), Momentum(0.9, masking=False)
    compressor = at_ratio_one(MEMBERS["sharded, hadamard, by tensor"])
    runs = simulate(compressor, gradients, momentum=momentum)
    velocity, expected = torch.zeros(TOTAL, dtype=torch.float64), []
    for gradient in gradients.double().mean(0):
        velocity = 0.9 * velocity + gradient
        expected.append(velocity)
    missing = (runs[0].updates.double() - torch.stack(expected)).abs().sum(0)
    assert is_nothing(missing / 10.0, gradients, runs[0].exchange)


@EVERY
@pytest.mark.parametrize("average", [True, False])
def test_sending_everything_is_plain_averaging(compressor: Compressor, average: bool) -> None:
    gradients = heavy_tailed(2, 4, TOTAL)
    expected = gradients.double().mean(0) if average else gradients.double().sum(0)
    for runs in (
        simulate(at_ratio_one(compressor), gradients, average=average),
        simulate(compressor, gradients, average=average, before_step=lambda exchange, number: exchange.flush()),
    ):
        missing = (runs[0].updates.double() - expected).abs().sum(0)
        assert is_nothing(missing, gradients, runs[0].exchange)
        assert not any(run.exchange.memory.residual.any() for run in runs)


@EVERY
def test_a_resumed_run_gives_the_same_bits(compressor: Compressor) -> None:
    gradients = heavy_tailed(2, 14, TOTAL)

    def resumed(comm: Communicator) -> Tensor:
        first, rest = gradients[comm.rank][:9], gradients[comm.rank][9:]
        before = make(compressor, comm)
        updates = [step(before, gradient) for gradient in first]
        after = make(compressor, comm)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        return torch.stack(updates + [step(after, gradient) for gradient in rest])

    for whole, parts in zip(simulate(compressor, gradients), run_in_process(2, resumed), strict=True):
        assert torch.equal(whole.updates, parts)


@EVERY
def test_a_void_step_changes_nothing(compressor: Compressor) -> None:
    gradients = heavy_tailed(2, 12, TOTAL)
    spoilt = torch.cat([gradients[:, :6], gradients[:, :1], gradients[:, 6:]], dim=1)
    spoilt[1, 6, 100] = torch.nan
    with pytest.warns(UserWarning, match="step 6 is void on all ranks: the gradient of '[ab].* on rank 1"):
        runs = simulate(compressor, spoilt)
    assert runs[0].updates[6].isnan().all()
    kept = torch.cat([runs[0].updates[:6], runs[0].updates[7:]])
    assert torch.equal(kept, simulate(compressor, gradients)[0].updates)


@EVERY
def test_a_parameter_without_a_gradient_keeps_its_memory(compressor: Compressor) -> None:
    gradients = heavy_tailed(2, 10, TOTAL)

    def without(comm: Communicator) -> bool:
        exchange = make(compressor, comm)
        for gradient in gradients[comm.rank]:
            step(exchange, gradient)
        exchange.flush()
        step(exchange, gradients[comm.rank, 0])
        for gradient in gradients[comm.rank, :3]:
            step(exchange, gradient)
        at = exchange.layout.index()["a.weight"]
        slot = exchange.layout.slots[at]
        before = exchange.in_model(exchange.memory.residual)[slot.offset : slot.stop].clone()
        for position, other in enumerate(exchange.layout.slots):
            if position != at:
                exchange.submit(position, gradients[comm.rank, 4, other.offset : other.stop].view(other.shape))
        exchange.run()
        after = exchange.in_model(exchange.memory.residual)[slot.offset : slot.stop]
        same = float((after - before).norm()) <= 1e-6 * float(before.norm())
        return same and exchange.absent == (at,) and not exchange.update_of(at).any()

    assert run_in_process(2, without) == [True, True]


def test_a_gradient_is_clipped_by_its_own_norm() -> None:
    gradients = heavy_tailed(1, 8, TOTAL)
    limit = 0.5 * float(gradients.norm(dim=2).min())
    clipped = gradients * (limit / gradients.norm(dim=2, keepdim=True))
    for name in ("sharded, hadamard, by tensor", "sketch in buckets, hadamard"):
        runs = simulate(replace(MEMBERS[name], clip_norm=limit), gradients)
        assert name.startswith("sketch") or conserved(runs, clipped)
        assert runs[0].exchange.stats.clip == pytest.approx(limit / float(gradients[0, -1].norm()), rel=1e-4)


def test_tensors_of_small_gradients_have_their_turn() -> None:
    """One of a hundredth of the size: by entries it waits, by tensor it does not."""
    gradients = torch.randn(1, 30, TOTAL, generator=torch.Generator().manual_seed(0))
    gradients[:, :, : 40 * 60 + 40] *= 0.01  # a.bias and a.weight
    sent = {}
    for power in (0.0, 1.0):
        [run] = simulate(replace(SHARDED, tensor_power=power), gradients)
        sent[power] = int(run.updates[-10:, : 40 * 60].count_nonzero())
    assert sent[0.0] == 0
    assert sent[1.0] > 100


def test_a_decaying_memory_forgets_at_its_rate() -> None:
    gradients = heavy_tailed(1, 12, TOTAL)
    gradients[:, 1:] = 0.0
    plain, fading = (simulate(replace(SHARDED, decay=decay), gradients)[0] for decay in (1.0, 0.5))
    waiting = (plain.residual != 0) & (fading.residual != 0)
    torch.testing.assert_close(fading.residual[waiting], plain.residual[waiting] * 0.5**12)


def test_error_feedback_reads_errors_of_the_model() -> None:
    """Of what a rank owns its share; what steps ahead by them steps in the model's coordinates."""
    gradients = heavy_tailed(2, 5, TOTAL)

    def read(comm: Communicator) -> tuple[Tensor, Tensor]:
        exchange = make(MEMBERS["sharded, hadamard, by tensor"], comm)
        for gradient in gradients[comm.rank]:
            step(exchange, gradient)
        errors = torch.empty(TOTAL)
        read_errors(exchange, errors)
        shares = exchange.memory.residual.clone()
        shares[comm.rank : exchange.layout.compressed : 2] /= 2
        return errors, exchange.in_model(shares)

    for errors, expected in run_in_process(2, read):
        assert torch.equal(errors, expected)
        assert errors.any()


def test_a_memory_of_another_domain_is_refused() -> None:
    saved = make(MEMBERS["sharded, dct"], SingleProcess())
    step(saved, heavy_tailed(TOTAL))
    for other in (SHARDED, replace(SHARDED, mixing="hadamard")):
        exchange = make(other, SingleProcess())
        with pytest.raises(ConfigurationError, match="mixing"):
            exchange.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"mixing": "fourier"}, "mixing must be 'dct', 'hadamard' or None, got 'fourier'"),
        ({"tensor_power": 1.5}, "tensor_power must be from 0 to 1, got 1.5"),
        ({"tensor_power": -0.1}, "tensor_power must be from 0 to 1, got -0.1"),
        ({"decay": 0.0}, "decay must be above 0 and at most 1, got 0.0"),
        ({"decay": 1.01}, "decay must be above 0 and at most 1, got 1.01"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        Compression.sharded(ratio=10.0, **PLAIN, **setting)


def test_mixed_is_sharded_with_these_settings() -> None:
    mixed = Compression.mixed(ratio=10.0)
    layout = mixed.layout(parameters().items())
    assert mixed.fit(layout, 10.0, 4) == Compression.sharded(ratio=10.0).fit(layout, 10.0, 4)
    assert not mixed.wants_anticipation
