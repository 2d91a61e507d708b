"""Exchanges give the bits of the processor's kernel on a GPU too.

Where there is no GPU, the code that serves devices runs on the processor in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import Anticipate, DistributedOptimizer, FactoredMoments, LocalSGD, StepAhead, wire
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.exchange import Exchange
from hvd_sketch.memory import Memory, Momentum
from hvd_sketch.sparse.codec import SparseCodec
from hvd_sketch.sparse.heaviest import heaviest_of_shards
from tests.support.compressors import EVERY, SHARDED, TABLE, TOTAL, conserved
from tests.support.simulation import Run, heavy_tailed, parameters
from tests.support.without_kernel import without_kernel

ON_GPU = torch.cuda.is_available()
EXACT = {name: member for name, member in TABLE.items() if "powersgd" not in name}
"""Those whose arithmetic has one result; of matrix products the order of sums is left open."""
exact = pytest.mark.parametrize("compressor", EXACT.values(), ids=EXACT)


def fewer(*values: Any) -> tuple[Any, ...]:
    """All of these on a GPU; the first, where the reference stands in for it, which has tests of its own."""
    return values if ON_GPU else values[:1]


@contextmanager
def served() -> Iterator[torch.device]:
    """The device whose code is under test."""
    with nullcontext() if ON_GPU else without_kernel():
        yield torch.device("cuda" if ON_GPU else "cpu")


def bits(values: Tensor) -> Tensor:
    """What tells 0.0 from -0.0."""
    return values.cpu().contiguous().view(torch.int32)


def gradients_of(kind: str, ranks: int, steps: int = 4) -> Tensor:
    values = heavy_tailed(ranks, steps, TOTAL, seed=7)
    if kind == "zeros":
        return values * (torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.05)
    return {"any": values, "ties": values.round(), "subnormal": values * 2.0**-140}[kind]


def drive(comm: Communicator, compressor: Any, gradients: Tensor, device: torch.device, **settings: Any) -> Run:
    """One rank's steps on a device."""
    layout = compressor.layout(parameters().items())
    exchange: Exchange = compressor.exchange(layout, comm, average=True, device=device, **settings)
    updates = []
    for gradient in gradients.to(device):
        exchange.submit_many(
            {at: gradient[slot.offset : slot.stop].view(slot.shape) for at, slot in enumerate(layout.slots)}
        )
        exchange.run()
        updates.append(exchange.update.float().cpu().clone())
    return Run(torch.stack(updates), exchange)


def run_on(device: torch.device, compressor: Any, gradients: Tensor, **settings: Any) -> list[Run]:
    """Every rank's steps on a device; what it keeps is then on the processor."""
    runs = run_in_process(
        len(gradients), lambda comm: drive(comm, compressor, gradients[comm.rank], device, **settings)
    )
    for run in runs:
        run.exchange.memory.residual = run.residual.cpu()
    return runs


def served_runs(compressor: Any, gradients: Tensor, **settings: Any) -> list[Run]:
    with served() as device:
        return run_on(device, compressor, gradients, **settings)


def both(compressor: Any, gradients: Tensor, **settings: Any) -> tuple[list[Run], list[Run]]:
    """The same steps on the device and by the processor's kernel."""
    return (
        served_runs(compressor, gradients, **settings),
        run_on(torch.device("cpu"), compressor, gradients, **settings),
    )


def check_equal(ours: list[Run], expected: list[Run]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(bits(one.updates), bits(other.updates))
        assert torch.equal(bits(one.residual), bits(other.residual))


@exact
@pytest.mark.parametrize("ranks", fewer(3, 1, 2))
def test_exchanges_have_the_bits_of_the_processor(compressor: Any, ranks: int) -> None:
    check_equal(*both(compressor, gradients_of("any", ranks)))


@exact
@pytest.mark.parametrize("kind", fewer("ties", "zeros", "subnormal"))
def test_zeros_ties_and_subnormal_gradients(compressor: Any, kind: str) -> None:
    check_equal(*both(compressor, gradients_of(kind, 2)))


@exact
@pytest.mark.parametrize("dtype", fewer(torch.bfloat16, torch.float16))
def test_gradients_of_half_precision(compressor: Any, dtype: torch.dtype) -> None:
    check_equal(*both(compressor, gradients_of("any", 2).to(dtype)))


@exact
def test_momentum_correction(compressor: Any) -> None:
    check_equal(*both(compressor, gradients_of("any", 2), momentum=Momentum(0.9, nesterov=True)))


@EVERY
def test_nothing_is_lost(compressor: Any) -> None:
    gradients = gradients_of("any", 3, steps=6)
    ours = served_runs(compressor, gradients)
    for run in ours[1:]:
        assert torch.equal(bits(run.updates), bits(ours[0].updates))
    assert conserved(ours, gradients)


@EVERY
@pytest.mark.parametrize("value", fewer(float("nan"), float("inf")))
def test_a_step_that_is_not_finite_changes_nothing(compressor: Any, value: float) -> None:
    gradients = gradients_of("any", 2, steps=4)
    gradients[1, 3, 77] = value
    before, ours = served_runs(compressor, gradients[:, :3]), served_runs(compressor, gradients)
    for run, old in zip(ours, before, strict=True):
        assert run.updates[3].isnan().all()
        assert torch.equal(bits(run.residual), bits(old.residual))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_what_is_clipped_is_what_the_processor_clips(clip: float | None) -> None:
    ours, expected = both(replace(SHARDED, clip_norm=clip), gradients_of("any", 2))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.updates, other.updates, rtol=1e-5, atol=1e-7)


def test_a_gradient_is_taken_in_with_one_rounding() -> None:
    residual, gradient = heavy_tailed(10_000, seed=1), heavy_tailed(10_000, seed=2)
    expected = (residual.double() + gradient.double() * torch.tensor(0.3).double()).float()
    with served() as device:
        memory = Memory(10_000, device)
        memory.residual.copy_(residual)
        memory.absorb(gradient.to(device), 0.3)
        assert torch.equal(bits(memory.residual), bits(expected))


@pytest.mark.parametrize("gain", [1.0, 1.9])
def test_a_factor_of_the_device_is_that_of_the_host(gain: float) -> None:
    gradient = heavy_tailed(10_000, seed=2)
    with served() as device:
        memories = [Memory(10_000, device, Momentum(gain - 1.0, nesterov=True) if gain > 1.0 else None) for _ in "ab"]
        clips: list[float | Tensor] = [0.3, torch.tensor(0.3, device=device)]
        for clip, memory in zip(clips, memories, strict=True):
            memory.absorb(gradient.to(device), clip)
            memory.absorb(gradient.to(device), clip)
        one, other = (memory.residual.cpu() for memory in memories)
    torch.testing.assert_close(one, other, rtol=1e-6 if not ON_GPU or gain > 1.0 else 0.0, atol=0.0)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", ["sharded", "topk", "stride"])
def test_a_step_waits_for_the_gpu_only_to_read_the_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = wire.read_header

    def waiting(message: Tensor) -> wire.Header:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        header = read(message)
        torch.cuda.set_sync_debug_mode(mode)
        return header

    monkeypatch.setattr(wire, "read_header", waiting)
    gradient = heavy_tailed(TOTAL).cuda()
    compressor = replace(EXACT[name], clip_norm=0.5)
    layout = compressor.layout(parameters().items())
    exchange = compressor.exchange(layout, SingleProcess(), average=True, device=gradient.device)
    parts = {at: gradient[slot.offset : slot.stop].view(slot.shape) for at, slot in enumerate(layout.slots)}
    updates = {at: torch.empty_like(part) for at, part in parts.items()}
    try:
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps compile
            exchange.submit_many(parts)
            exchange.run()
            exchange.write_update(updates)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("universe", "count"), [(1, 1), (9, 9), (1000, 3), (70_000, 1025), (3_000_001, 50_000)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-130])
def test_codes_have_the_bytes_of_the_processor(universe: int, count: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(count)
    chosen = [torch.randperm(universe, generator=generator)[:count].sort().values for _ in range(3)]
    indices, values = torch.stack(chosen), heavy_tailed(3, count, seed=3) * scale
    values[:, ::5] = 0.0
    codec = SparseCodec(universe, count)
    expected = codec.encode(indices, values)
    with served() as device:
        code, decoded = codec.encode(indices.to(device), values.to(device))
        back = codec.decode(code)
    assert torch.equal(code.cpu(), expected[0])
    assert torch.equal(bits(decoded), bits(expected[1]))
    assert torch.equal(back[0].cpu(), indices)
    assert torch.equal(bits(back[1]), bits(expected[1]))


@pytest.mark.parametrize("shards", fewer(3, 1, 2, 8))
@pytest.mark.parametrize("size", [1000, 70_001, 3_000_000 if ON_GPU else 300_001])
def test_the_heaviest_are_those_of_the_processor(shards: int, size: int) -> None:
    vector = heavy_tailed(size, seed=size)
    for values in (vector, vector.round(), vector * (vector > 2.0), torch.zeros(size)):
        for count in {1, size // shards // 40 + 1, size // shards}:
            expected = heaviest_of_shards(values, shards, count)
            with served() as device:
                ours = heaviest_of_shards(values.to(device), shards, count)
            assert torch.equal(ours[0].cpu(), expected[0])
            assert torch.equal(bits(ours[1]), bits(expected[1]))


def model_and_batch(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).to(device)
    inputs = torch.randn(32, 40, generator=torch.Generator().manual_seed(1)).to(device)
    return model, inputs, inputs[:, :4].argmax(1)


Wrap = Callable[[torch.optim.Optimizer, nn.Module], Any]


def train(wrap: Wrap, device: torch.device, steps: int = 12) -> list[float]:
    model, inputs, targets = model_and_batch(device)
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with getattr(optimizer, "step_ahead", nullcontext)():
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


FEEDBACKS: dict[str, Any] = {
    "none": None,
    "anticipate": Anticipate(),
    "moments": Anticipate(second_moments=FactoredMoments()),
    "step ahead": StepAhead(),
}


@pytest.mark.parametrize("feedback", FEEDBACKS.values(), ids=FEEDBACKS)
@pytest.mark.parametrize("name", fewer("sharded", "sketch, half", "topk", "powersgd"))
def test_training_goes_as_on_the_processor(name: str, feedback: Any) -> None:
    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        return DistributedOptimizer(
            optimizer,
            model.named_parameters(),
            replace(TABLE[name], dense_below=0),
            comm=SingleProcess(),
            error_feedback=feedback,
        )

    with served() as device:
        losses = train(wrap, device)
    torch.testing.assert_close(losses, train(wrap, torch.device("cpu")), rtol=2e-2, atol=2e-2)


def test_local_steps_go_as_on_the_processor() -> None:
    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        return LocalSGD(optimizer, model, SingleProcess(), compression=replace(SHARDED, dense_below=0), period=3)

    with served() as device:
        losses = train(wrap, device)
    torch.testing.assert_close(losses, train(wrap, torch.device("cpu")), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@exact
def test_a_second_run_has_the_same_bits(compressor: Any) -> None:
    gradients = gradients_of("any", 2)
    check_equal(served_runs(compressor, gradients), served_runs(compressor, gradients))


@pytest.mark.parametrize("dtype", fewer(torch.float16, torch.bfloat16))
def test_mixed_precision_with_a_scaler(dtype: torch.dtype) -> None:
    with served() as device:
        model, inputs, targets = model_and_batch(device)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=5)
        compressor = replace(SHARDED, dense_below=0)
        optimizer: Any = DistributedOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            model.named_parameters(),
            compressor,
            comm=SingleProcess(),
            grad_scaler=scaler,
        )
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype):
                loss = nn.functional.cross_entropy(model(inputs), targets)
            scaler.scale(loss).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert bool(optimizer.exchange.memory.residual.isfinite().all())
