"""A step with a gradient that is not finite on one rank leaves everything as it was, on all ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_sketch as hvd
from hvd_sketch import Anticipate, Compression, Momentum, TensorTopK
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.schedules.base import per_epoch
from tests.support.compressors import EVERY, TABLE
from tests.support.methods import METHODS, Method, adamw, exchanging, fresh, plain_sgd
from tests.support.training import flat, loss

SIZE, STEPS, SPOILT = 3, 9, (0, 4, 7)
"""As many steps that count; before these, one that is spoilt on rank 1."""

EXCHANGING = {
    name: method for name, method in METHODS.items() if name.startswith(("exchange", "anticipate", "step ahead"))
}
SCHEDULES: dict[str, Callable[[], Compressor]] = {
    "warmup": lambda: Compression.topk(ratio=8.0, warmup_steps=6, dense_below=100),
    "per epoch": lambda: Compression.topk(schedule=per_epoch([1.0, 4.0, 8.0], 3), dense_below=100),
    "accordion": lambda: TensorTopK(schedule=hvd.Accordion(4.0, 16.0, 2), dense_below=100),
    "accordion, whole": lambda: Compression.sharded(schedule=hvd.Accordion(4.0, 16.0, 2)),
    "accordion for batches": lambda: Compression.topk(schedule=hvd.AccordionBatch(1, 2, 8.0, 2), dense_below=100),
    "energy target": lambda: Compression.sketch(schedule=hvd.EnergyTarget(0.5, every=2), dense_below=100),
    "guard": lambda: Compression.sharded(schedule=hvd.Guard(16.0, backlog=2.0, every=2)),
}


@contextmanager
def spoiling(model: Any, value: float, names: Sequence[str] = ("2.weight",)) -> Iterator[None]:
    """Backward inside finds this value in the gradients of these parameters."""

    def put(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[3] = value
        return gradient

    handles = [model.get_parameter(name).register_hook(put) for name in names]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def ahead(optimizer: Any) -> Iterator[None]:
    with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
        yield


def step(optimizer: Any, model: Any, comm: Communicator, number: int, *, spoilt: bool = False) -> None:
    optimizer.zero_grad()
    value = math.inf if number % 2 else math.nan
    with ahead(optimizer), spoiling(model, value) if spoilt and comm.rank == 1 else nullcontext():
        loss(model, comm.rank, number).backward()
    optimizer.step()


def everything(optimizer: Any, model: Any) -> dict[str, Any]:
    """All that a run goes on from: numbers and tensors, flat."""
    found: dict[str, Any] = {"model": flat(model)}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}", item)
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                add(f"{name}.{number}", item)
        else:
            found[name] = value.clone() if isinstance(value, Tensor) else value

    add("optimizer", optimizer.state_dict())
    add("exchange", optimizer.exchange.state_dict())
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs, bit for bit."""
    assert one.keys() == other.keys()
    same = {
        name: torch.equal(value, other[name]) if isinstance(value, Tensor) else repr(value) == repr(other[name])
        for name, value in one.items()
    }
    return [name for name, is_same in same.items() if not is_same]


def differences(comm: Communicator, method: Method) -> tuple[list[str], int]:
    """Between a run with void steps and one without, and how many void steps were counted."""
    model, optimizer = fresh(method, comm)
    plain, expected = fresh(method, comm)
    for number in range(STEPS):
        if number in SPOILT:
            step(optimizer, model, comm, 50 + number, spoilt=True)
        step(optimizer, model, comm, number)
        step(expected, plain, comm, number)
    return equal(everything(optimizer, model), everything(expected, plain)), optimizer.exchange.stats.skipped


def check(method: Method) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hvd_sketch: ")
        for different, skipped in run_in_process(SIZE, lambda comm: differences(comm, method)):
            assert different == []
            assert skipped == len(SPOILT)


@pytest.mark.parametrize("method", EXCHANGING.values(), ids=EXCHANGING)
def test_a_run_goes_on_as_if_the_void_step_had_never_been(method: Method) -> None:
    check(method)


@EVERY
def test_with_every_compressor_and_a_momentum(compressor: Compressor) -> None:
    check(Method(exchanging(compressor)))


@pytest.mark.parametrize("name", ["sketch, in turn", "topk", "sharded", "powersgd"])
def test_with_momentum_correction(name: str) -> None:
    check(Method(exchanging(replace(TABLE[name], momentum=Momentum(0.9))), plain_sgd))


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_every_schedule(name: str) -> None:
    """Its state stands still, and so does the number of the step; each rank has a schedule of its own."""
    check(Method(lambda inner, model, comm: exchanging(SCHEDULES[name]())(inner, model, comm)))


def test_one_warning_a_run_names_the_first_rank_and_parameter() -> None:
    def body(comm: Communicator) -> None:
        model, optimizer = fresh(METHODS["exchange"], comm)
        for number in range(4):
            step(optimizer, model, comm, number, spoilt=number in (1, 3))

    with pytest.warns(UserWarning, match="is void") as told:
        run_in_process(SIZE, body)
    (text,) = [str(warning.message) for warning in told]
    assert "step 1 is void on all ranks: the gradient of '2.weight' on rank 1 is not finite" in text


def scaled(comm: Communicator, method: Method) -> tuple[list[str], list[float]]:
    """Under a scaler, with an overflow on rank 1 alone."""
    model, optimizer = fresh(method, comm)
    plain, expected = fresh(method, comm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scales = []
    for number in range(4):
        for spoilt in (False, True) if number == 2 else (False,):
            optimizer.zero_grad()
            with ahead(optimizer), spoiling(model, math.inf) if spoilt and comm.rank == 1 else nullcontext():
                scaler.scale(loss(model, comm.rank, number)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        step(expected, plain, comm, number)
    return equal(everything(optimizer, model), everything(expected, plain)), scales


@pytest.mark.parametrize("method", EXCHANGING.values(), ids=EXCHANGING)
def test_under_a_scaler_the_scale_falls_on_all_ranks(method: Method) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hvd_sketch: ")
        for different, scales in run_in_process(SIZE, lambda comm: scaled(comm, method)):
            assert different == []
            assert scales == [2.0**12] * 3 + [2.0**11] * 2


@EVERY
def test_a_finite_gradient_of_a_norm_beyond_float32_is_clipped(compressor: Compressor) -> None:
    """One entry of 3e38 in each of two parameters."""
    clipping = replace(compressor, clip_norm=1.0)

    def body(comm: Communicator) -> tuple[bool, int, float]:
        model, optimizer = fresh(Method(exchanging(clipping), plain_sgd), comm)
        for number in range(4):
            optimizer.zero_grad()
            huge = comm.rank == 1 and number == 3
            with spoiling(model, 3e38, ("0.weight", "2.weight")) if huge else nullcontext():
                loss(model, comm.rank, number).backward()
            optimizer.step()
        return bool(flat(model).isfinite().all()), optimizer.exchange.stats.skipped, optimizer.exchange.stats.clip

    seen = run_in_process(2, body)
    assert all(finite and skipped == 0 for finite, skipped, _ in seen)
    assert 0.0 < seen[1][2] < 1e-37


def test_adam_counts_no_void_step() -> None:
    check(Method(exchanging(Compression.sharded(ratio=8.0, warmup_steps=0), Anticipate()), adamw))
