"""Loss scales in every order that PyTorch's and Horovod's pages show: the same training as without one, to the bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from hvd_sketch import (
    Anticipate,
    Compression,
    ConfigurationError,
    DistributedOptimizer,
    FactoredMoments,
    SingleProcess,
    StepAhead,
)
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.instances import instances_of
from tests.support.compressors import BUCKETS, EVERY, SHARDED, TOPK
from tests.support.training import flat, loss, net

STEPS, NORM = 4, 0.05
FEEDBACK: dict[str, Any] = {
    "plain": None,
    "anticipate": Anticipate(),
    "factored": Anticipate(second_moments=FactoredMoments()),
    "step ahead": StepAhead(),
}
SCALES = pytest.mark.parametrize("scale", [1.0, 2.0**12, 2.0**24])


@contextmanager
def ahead(optimizer: Any) -> Iterator[None]:
    with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
        yield


class Unscaled:
    """Stands in for a scaler where there is none."""

    def unscale_(self, optimizer: Any) -> None:
        return

    def step(self, optimizer: Any) -> None:
        optimizer.step()


def step_alone(optimizer: Any, model: nn.Module, scaler: Any) -> None:
    scaler.step(optimizer)


def unscale_and_clip(optimizer: Any, model: nn.Module, scaler: Any) -> None:
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), NORM)
    scaler.step(optimizer)


def synchronize_unscale_and_clip(optimizer: Any, model: nn.Module, scaler: Any) -> None:
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), NORM)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)


def synchronize_and_step(optimizer: Any, model: nn.Module, scaler: Any) -> None:
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        scaler.step(optimizer)


Order = Callable[[Any, nn.Module, Any], None]
ORDERS: list[Order] = [step_alone, unscale_and_clip, synchronize_unscale_and_clip, synchronize_and_step]
EVERY_ORDER = pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)


def run(
    comm: Communicator,
    order: Order,
    scale: float | None,
    *,
    compressor: Any = SHARDED,
    feedback: Any = None,
    told: bool = True,
    overflow: int | None = None,
) -> tuple[Tensor, Tensor, float, int]:
    """Parameters, memory, scale and void steps; in step ``overflow`` rank 1 alone overflows, twice."""
    model = net()
    scaler: Any = Unscaled() if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    options = {"grad_scaler": scaler} if told and scale is not None else {}
    adam = getattr(feedback, "second_moments", None) is not None
    inner: Any = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer: Any = DistributedOptimizer(
        inner(model.parameters(), 0.01),
        model.named_parameters(),
        compressor,
        comm=comm,
        error_feedback=feedback,
        **options,
    )
    for step in range(STEPS):
        for overflows in (True, True, False) if step == overflow and scale is not None else (False,):
            optimizer.zero_grad()
            with ahead(optimizer):
                value = loss(model, comm.rank, step)
                if overflows and comm.rank == 1:
                    value = value * math.inf
                (value if scale is None else scaler.scale(value)).backward()
            order(optimizer, model, scaler)
            if scale is not None:
                scaler.update()
    residual = optimizer.exchange.memory.residual.clone()
    return flat(model), residual, 0.0 if scale is None else scaler.get_scale(), optimizer.exchange.stats.skipped


def check(order: Order, scale: float, size: int = 2, **settings: Any) -> None:
    """The same with a scale as without."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hvd_sketch: step")
        scaled = run_in_process(size, lambda comm: run(comm, order, scale, **settings))
        plain = run_in_process(size, lambda comm: run(comm, order, None, **settings))
    voids = 2 if "overflow" in settings else 0
    for (model, kept, left, skipped), (expected, memory, _, _) in zip(scaled, plain, strict=True):
        assert torch.equal(model, expected)
        assert torch.equal(kept, memory)
        assert (left, skipped) == (scale * 0.5**voids, voids)


@EVERY_ORDER
def test_nobody_needs_to_tell_of_the_scaler(order: Order) -> None:
    """Where ranks are processes; here is one, in which no scaler of a test before is in use any more."""
    for scaler in instances_of(GradScaler):
        scaler._enabled = False
    scaled, plain = (run(SingleProcess(), order, scale, told=False) for scale in (2.0**12, None))
    assert torch.equal(scaled[0], plain[0])
    assert torch.equal(scaled[1], plain[1])


@SCALES
@EVERY_ORDER
@pytest.mark.parametrize("feedback", list(FEEDBACK.values())[:3], ids=list(FEEDBACK)[:3])
def test_any_order_and_scale_train_as_without(order: Order, scale: float, feedback: Any) -> None:
    check(order, scale, feedback=feedback)


@SCALES
@pytest.mark.parametrize("order", ORDERS[:2], ids=lambda order: order.__name__)
def test_step_ahead_as_well(order: Order, scale: float) -> None:
    check(order, scale, feedback=FEEDBACK["step ahead"])


@EVERY_ORDER
@pytest.mark.parametrize("feedback", list(FEEDBACK.values())[:2], ids=list(FEEDBACK)[:2])
def test_an_overflow_on_one_rank_halves_every_ranks_scale_and_nothing_else(order: Order, feedback: Any) -> None:
    check(order, 2.0**12, feedback=feedback, overflow=2)


@EVERY
@pytest.mark.parametrize("order", [step_alone, synchronize_unscale_and_clip], ids=lambda order: order.__name__)
def test_with_every_compressor(order: Order, compressor: Any) -> None:
    """Those that send in backward, too."""
    check(order, 2.0**12, compressor=compressor, overflow=1)


def test_what_was_sent_in_backward_cannot_be_unscaled_by_hand_any_more() -> None:
    with pytest.raises(ConfigurationError, match=r"change gradients after optimizer.synchronize\(\)"):
        check(unscale_and_clip, 2.0**12, compressor=BUCKETS)


def test_a_scaler_of_somebody_else_changes_nothing_of_what_is_sent_in_backward() -> None:
    """Whether it is ours the first step tells; until then nothing is sent early."""
    plain = run(SingleProcess(), step_alone, None, compressor=BUCKETS)
    other = torch.amp.GradScaler("cpu")
    other.scale(torch.ones(()))
    beside = run(SingleProcess(), step_alone, None, compressor=BUCKETS)
    assert torch.equal(beside[0], plain[0])
    assert torch.equal(beside[1], plain[1])


def test_a_scaler_of_somebody_else_is_told_of_when_gradients_are_synchronized_by_hand() -> None:
    """The first step is taken to carry its scale; from the second one on what is kept is right."""
    other = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    other.scale(torch.ones(()))

    def train(**settings: Any) -> list[float]:
        model, kept = net(), []
        optimizer: Any = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.0), model.named_parameters(), TOPK, comm=SingleProcess(), **settings
        )
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, 0, 0).backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
            kept.append(float(optimizer.exchange.memory.residual.norm()))
        return kept

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = train(grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    with pytest.warns(UserWarning, match=r"It is not.*too small by it.*torch.amp.GradScaler\(enabled=False\)") as told:
        first, second = train()
    assert len(told) == 1
    assert first == pytest.approx(expected[0] / 2.0**12)
    assert second == pytest.approx(expected[0], rel=1e-2)


def test_of_several_scalers_the_right_one_must_be_told() -> None:
    other = torch.amp.GradScaler("cpu")
    other.scale(torch.ones(()))
    with pytest.warns(UserWarning, match="several GradScalers are in use.*pass grad_scaler="):
        run(SingleProcess(), synchronize_and_step, 2.0**12, told=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(SingleProcess(), synchronize_and_step, 2.0**12, told=True)
        run(SingleProcess(), step_alone, 2.0**12, told=False)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, None), (torch.float16, 2.0**24), (torch.float16, 1.0)])
def test_autocast_trains_on_all_ranks_alike(dtype: torch.dtype, scale: float | None) -> None:
    """In bfloat16 without a scaler; in float16 a scale that is too large falls until it fits."""

    def body(comm: Communicator) -> tuple[Tensor, float, float, int, float]:
        model = net()
        inner = torch.optim.SGD(model.parameters(), 0.1)
        compressor = Compression.sharded(ratio=10.0, warmup_steps=0)
        optimizer: Any = DistributedOptimizer(
            inner, model.named_parameters(), compressor, comm=comm, error_feedback=None
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        first = float(loss(model, 0, 0))
        for step in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                value = 1000.0 * loss(model, comm.rank, step)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        return flat(model), float(loss(model, 0, 0)), first, optimizer.exchange.stats.skipped, scaler.get_scale()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hvd_sketch: step")
        (model, end, first, skipped, left), other = run_in_process(2, body)
    assert torch.equal(model, other[0])
    assert end < first
    assert (left, skipped) == (other[4], other[3])
    assert left == (scale or 1.0) * 0.5**skipped
    assert (skipped > 0) is (scale == 2.0**24)
