"""The arithmetic of an exchange: nothing is lost, all ranks get the same, and sending all is plain averaging."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import Exchange
from hvd_sketch.memory import Momentum
from tests.support import known_answers
from tests.support.compressors import (
    BUCKETS,
    COMPRESSED,
    EVERY,
    EVERYTHING,
    HALF,
    PLAIN,
    SINGLE,
    SIZES,
    TOPK,
    TOTAL,
    at_ratio_one,
    conserved,
)
from tests.support.simulation import UNIT_ROUNDOFF, Run, heavy_tailed, make, simulate, step


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.floats(1e-12, 1e12), st.integers(0, 2**31), st.booleans(), st.floats(1.0, 4.0))
def test_nothing_is_lost_at_any_magnitude(
    size: int, magnitude: float, seed: int, half: bool, oversampling: float
) -> None:
    gradients = heavy_tailed(size, 6, TOTAL, seed=seed) * magnitude
    compressor = Compression.sketch(ratio=20.0, half=half, oversampling=oversampling, seed=seed, **PLAIN)
    assert conserved(simulate(compressor, gradients), gradients)


def test_values_beyond_half_precision_stay_in_the_memory() -> None:
    """Ranks that cancel each other hold far more than the sum tells: what does not fit the wire is kept."""
    size = 2
    gradients = heavy_tailed(size, 8, TOTAL)
    gradients[:, 4] += heavy_tailed(TOTAL, seed=7) * torch.tensor([1e6, -1e6]).view(2, 1)
    gradients[:, 6, COMPRESSED:] *= 1e5
    kept: list[float] = []

    def note(exchange: Exchange, number: int) -> None:
        if number in (5, 7):
            kept.append(float(exchange.memory.residual[COMPRESSED:].abs().max()))

    runs = simulate(HALF, gradients, before_step=note)
    assert min(kept) > 1.0
    assert all(run.updates.isfinite().all() for run in runs)
    assert conserved(runs, gradients)


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e8])
def test_half_precision_follows_the_magnitude_of_the_gradients(magnitude: float) -> None:
    """Also after steps without any gradient, from which no scale can be learned."""
    gradients = torch.zeros(2, 8, TOTAL)
    gradients[:, 2:] = heavy_tailed(2, 6, TOTAL) * magnitude
    updates = simulate(HALF, gradients)[0].updates
    dense = gradients.mean(0)[:, COMPRESSED:]
    torch.testing.assert_close(
        updates[:, COMPRESSED:].sum(0), dense.sum(0), rtol=0, atol=0.01 * float(dense.abs().max())
    )
    assert all(float(update[:COMPRESSED].abs().max()) > 0.1 * magnitude for update in updates[2:])


@EVERY
@SIZES
@pytest.mark.parametrize("average", [True, False])
def test_sending_everything_is_plain_averaging(compressor: Compressor, size: int, average: bool) -> None:
    """A ratio of 1 and a flush in every step both give what a dense exchange gives."""
    gradients = heavy_tailed(size, 4, TOTAL)
    for runs in (
        simulate(at_ratio_one(compressor), gradients, average=average),
        simulate(compressor, gradients, average=average, before_step=lambda exchange, number: exchange.flush()),
    ):
        assert is_plain(runs, gradients, average=average)


@SIZES
@pytest.mark.parametrize("average", [True, False])
def test_a_table_without_collisions_sends_everything(size: int, average: bool) -> None:
    """k = d."""
    gradients = heavy_tailed(size, 5, TOTAL)
    for compressor in (EVERYTHING, replace(EVERYTHING, buckets=2)):
        assert is_plain(simulate(compressor, gradients, average=average), gradients, average=average)


def is_plain(runs: list[Run], gradients: Tensor, *, average: bool) -> bool:
    """Whether the updates are the ranks' means or sums to rounding, and nothing is kept."""
    expected = gradients.double().mean(0) if average else gradients.double().sum(0)
    bound = (len(runs) + 1) * UNIT_ROUNDOFF * gradients.double().abs().sum(0)
    same = ((runs[0].updates.double() - expected).abs() <= bound).all()
    return bool(same) and not any(run.residual.any() for run in runs)


@EVERY
def test_a_flush_empties_every_memory_and_lasts_one_step(compressor: Compressor) -> None:
    def flush_in_step_4(exchange: Exchange, number: int) -> None:
        if number == 4:
            assert exchange.memory.residual.any()
            exchange.flush()
        if number == 5:
            assert not exchange.memory.residual.any()

    gradients = heavy_tailed(3, 6, TOTAL)
    runs = simulate(compressor, gradients, before_step=flush_in_step_4)
    assert conserved(runs, gradients)
    assert all(run.residual.any() for run in runs)


@pytest.mark.parametrize("half", [False, True])
def test_a_flush_that_one_rank_asks_for_is_done_by_all(half: bool) -> None:
    """Checkpoints are often written by rank 0 alone."""

    def flush_on_rank_1(exchange: Exchange, number: int) -> None:
        if number == 3 and exchange.comm.rank == 1:
            exchange.flush()

    gradients = heavy_tailed(3, 4, TOTAL)
    for compressor in (Compression.sketch(ratio=10.0, half=half, **PLAIN), TOPK):
        runs = simulate(compressor, gradients, before_step=flush_on_rank_1)
        assert not any(run.residual.any() for run in runs)
        assert all(torch.equal(run.updates, runs[0].updates) for run in runs)


def test_an_exchange_is_linear() -> None:
    """The sum of the ranks' gradients decides: one rank that holds the sum gets the same update, to the bit.

    Small integers make every sum exact, so the order of additions does not matter.
    """
    integers = heavy_tailed(4, 10, TOTAL).mul(4).round()
    whole = integers.sum(0, keepdim=True)
    for scale in (1.0, 2.0**-20):
        split = simulate(SINGLE, integers, average=False)[0].updates
        alone = simulate(SINGLE, whole * scale, average=False)[0].updates
        assert torch.equal(split * scale, alone)


def test_a_parameter_that_was_not_handed_in_counts_as_gradient_zero() -> None:
    gradients = heavy_tailed(2, 6, TOTAL)
    gradients[0, :, :2400] = 0.0
    expected = simulate(HALF, gradients)

    def body(comm: Communicator) -> Tensor:
        exchange = make(HALF, comm)
        updates = []
        for gradient in gradients[comm.rank]:
            for position, slot in reversed(list(enumerate(exchange.layout.slots))):
                if comm.rank != 0 or slot.name != "a.weight":
                    exchange.submit(position, gradient[slot.offset : slot.stop].view(slot.shape))
            exchange.run()
            updates.append(exchange.update.clone())
        return torch.stack(updates)

    assert torch.equal(run_in_process(2, body)[1], expected[0].updates)


@pytest.mark.parametrize("momentum", [None, Momentum(0.9), Momentum(0.8, nesterov=True, masking=False)], ids=str)
def test_residual_and_momentum_stay_with_their_coordinate(momentum: Momentum | None) -> None:
    """Against a simulation that knows the sum exactly: a sketch with hardly a collision finds the true top k."""
    size, steps, k = 3, 12, 200
    gradients = heavy_tailed(size, steps, TOTAL).double()
    compressor = Compression.sketch(rows=7, cols=54 * COMPRESSED, k=k, half=False, **PLAIN)
    runs = simulate(compressor, gradients.float(), momentum=momentum)
    factor = momentum.factor if momentum else 0.0
    nesterov = momentum is not None and momentum.nesterov
    u, v = torch.zeros(size, TOTAL, dtype=torch.float64), torch.zeros(size, TOTAL, dtype=torch.float64)
    for number in range(steps):
        g = gradients[:, number]
        u = factor * (u + g) if nesterov else factor * u + g
        v = v + u + g if nesterov else v + u
        total = v.sum(0)
        heavy = total[:COMPRESSED].abs().topk(k).indices
        update = torch.zeros(TOTAL, dtype=torch.float64)
        update[heavy] = total[heavy] / size
        update[COMPRESSED:] = total[COMPRESSED:] / size
        v[:, heavy] = 0.0
        v[:, COMPRESSED:] = 0.0
        if momentum is not None and momentum.masking:
            u[:, heavy] = 0.0
        torch.testing.assert_close(runs[0].updates[number].double(), update, rtol=1e-5, atol=1e-4)
    for rank, run in enumerate(runs):
        torch.testing.assert_close(run.residual.double(), v[rank], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("k", "momentum"), known_answers.WEIGHTS)
@pytest.mark.parametrize("size", [1, 2])
def test_known_answers(k: int, momentum: float, size: int) -> None:
    compressor = Compression.sketch(cols=2, k=k, half=False, dense_below=1, **PLAIN)

    def body(comm: Communicator) -> list[Tensor]:
        correction = Momentum(momentum) if momentum else None
        exchange = make(compressor, comm, {"w": (2, 1)}, average=False, momentum=correction)
        weights = [torch.zeros(2)]
        for _ in range(3):
            gradient = known_answers.gradient(weights[-1], comm.rank, size)
            weights.append(weights[-1] - known_answers.LEARNING_RATE * step(exchange, gradient))
        return weights[1:]

    for weights in run_in_process(size, body):
        expected = torch.tensor(known_answers.WEIGHTS[k, momentum])
        torch.testing.assert_close(torch.stack(weights), expected, rtol=0, atol=1e-6)


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_on_one_rank_voids_the_step_on_all(compressor: Compressor, bad: float) -> None:
    gradients = heavy_tailed(3, 8, TOTAL)
    poisoned = gradients.clone()
    poisoned[1, 4, 17] = bad
    before: list[Tensor] = [torch.empty(0)] * 3

    def check(exchange: Exchange, number: int) -> None:
        residual = exchange.memory.residual
        if number == 4:
            before[exchange.comm.rank] = residual.clone()
        if number == 5:
            assert torch.equal(residual, before[exchange.comm.rank])

    runs = simulate(compressor, poisoned, before_step=check)
    for run in runs:
        assert run.updates[4].isnan().all()
        assert run.updates[5:].isfinite().all()
        assert run.exchange.stats.skipped == 1
    gradients[:, 4] = 0.0
    for run in runs:
        run.updates[4] = 0.0
    assert conserved(runs, gradients)


def test_a_flush_waits_for_a_step_that_counts() -> None:
    poisoned = heavy_tailed(2, 5, TOTAL)
    poisoned[0, 3, 0] = float("nan")

    def flush_in_step_3(exchange: Exchange, number: int) -> None:
        if number == 3:
            exchange.flush()

    assert not any(run.residual.any() for run in simulate(HALF, poisoned, before_step=flush_in_step_3))


@pytest.mark.parametrize(
    ("size", "compressor"), [(2, HALF), (4, HALF), (2, SINGLE), (4, BUCKETS), (2, TOPK), (4, TOPK)]
)
@pytest.mark.parametrize("ratio", [5.0, 40.0])
def test_bytes_sent_match_the_ratio(size: int, compressor: Compressor, ratio: float) -> None:
    shapes = {"w.weight": (500, 800), "w.bias": (500,), "v.weight": (300, 500)}
    settings: dict[str, Any] = {"ratio": ratio, "warmup_steps": 4}
    asked = replace(compressor, **settings)
    at_full_ratio: list[tuple[int, int]] = [(0, 0)] * size

    def note(exchange: Exchange, number: int) -> None:
        if number == 5:  # the first half-precision message of a sketch still travels in single precision
            at_full_ratio[exchange.comm.rank] = (exchange.stats.dense_bytes, exchange.stats.bytes_sent)

    runs = simulate(asked, heavy_tailed(size, 8, 550_500), shapes, before_step=note)
    for run, (dense_before, sent_before) in zip(runs, at_full_ratio, strict=True):
        stats = run.exchange.stats
        assert (stats.dense_bytes - dense_before) / (stats.bytes_sent - sent_before) == pytest.approx(ratio, rel=0.02)
        assert stats.ratio < ratio


def test_captured_energy_is_the_share_of_the_memory_that_was_sent() -> None:
    gradients = heavy_tailed(2, 5, TOTAL)
    exact = Compression.sketch(rows=7, cols=54 * COMPRESSED, k=200, half=False, **PLAIN)
    left = [run.residual for run in simulate(exact, gradients)]
    run = simulate(exact, gradients)[0]
    sent = float((run.updates[-1][:COMPRESSED].double() * 2).square().sum())
    kept = float((left[0] + left[1])[:COMPRESSED].double().square().sum())
    assert run.exchange.stats.captured_energy == pytest.approx(sent / (sent + kept), rel=1e-4)
    everything = replace(exact, k=COMPRESSED)
    assert simulate(everything, gradients)[0].exchange.stats.captured_energy == pytest.approx(1.0, rel=1e-4)
    assert 0.0 < simulate(HALF, gradients)[0].exchange.stats.captured_energy < 1.0


@EVERY
@pytest.mark.parametrize("momentum", [None, Momentum(0.9, masking=False)], ids=str)
def test_a_saved_memory_continues_as_if_never_saved(compressor: Compressor, momentum: Momentum | None) -> None:
    """The fifteen, item 7 in arithmetic: tensors, numbers and strings only, so that ``weights_only`` loads them."""
    gradients = heavy_tailed(2, 9, TOTAL)
    expected = simulate(compressor, gradients, momentum=momentum)

    def body(comm: Communicator) -> Tensor:
        first, second = (make(compressor, comm, momentum=momentum) for _ in range(2))
        for gradient in gradients[comm.rank, :5]:
            step(first, gradient)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        return torch.stack([step(second, gradient) for gradient in gradients[comm.rank, 5:]])

    for updates, run in zip(run_in_process(2, body), expected, strict=True):
        assert torch.equal(updates, run.updates[5:])


def test_a_memory_of_another_rank_size_or_model_is_refused() -> None:
    def body(comm: Communicator) -> dict[str, Any]:
        exchange = make(HALF, comm)
        step(exchange, heavy_tailed(TOTAL))
        return exchange.state_dict()

    states = run_in_process(2, body)

    def load(comm: Communicator) -> None:
        exchange = make(HALF, comm)
        before = exchange.state_dict()
        for key, state in (
            ("rank", states[1 - comm.rank]),
            ("size", {**states[comm.rank], "size": 4}),
            ("parameters", {**states[comm.rank], "parameters": "weight[3x4]"}),
        ):
            with pytest.raises(
                ConfigurationError, match=rf"rank {comm.rank}: the saved memory.*: {key} is .*flush\(\)"
            ):
                exchange.load_state_dict(state)
        assert exchange.step == before["step"]
        assert torch.equal(exchange.memory.residual, before["memory"]["residual"])

    run_in_process(2, load)


def test_a_single_process_compresses_and_sends_nothing() -> None:
    exchange = make(HALF, SingleProcess())
    gradients = heavy_tailed(1, 5, TOTAL)
    updates = torch.stack([step(exchange, gradient) for gradient in gradients[0]])
    assert int(updates[-1].count_nonzero()) < TOTAL // 2
    assert exchange.stats.bytes_sent == 0
    assert conserved([Run(updates, exchange)], gradients)


class HostReads(TorchFunctionMode):
    """Notes the calls by which a host waits for values of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compressor", [HALF, SINGLE, BUCKETS], ids=["half", "single", "buckets"])
def test_a_sketched_step_waits_for_the_device_once_before_and_once_after_every_round(compressor: Compressor) -> None:
    """On a GPU each of these empties its queue; the norm of what begins in a bucket, two rounds, and nothing else."""
    exchange = make(compressor, SingleProcess())
    gradients = heavy_tailed(4, TOTAL)
    for gradient in gradients[:3]:
        step(exchange, gradient)
    exchange.submit_all(gradients[3])
    with HostReads() as host:
        exchange.run()
    buckets, slots = exchange.layout.buckets, exchange.layout.slots
    norms = [where for where in buckets if slots[exchange.layout.positions(where)]]
    assert len(host.calls) == len(norms) + 2 * len(buckets), host.calls
