"""Gradients count as they are at the step, and those that are thrown away leave no trace: with every compressor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import Anticipate, ConfigurationError, DistributedOptimizer, StepAhead
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from tests.support.compressors import BUCKETS, EVERY, IN_TURN, SHARDED
from tests.support.training import flat, loss, net

SIZE, STEPS = 2, 4
STREAMING = (BUCKETS, IN_TURN)  # the members of the table that begin to send in backward
Change = Callable[[nn.Module], object]


def scale(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(0.25)


def freeze(model: nn.Module) -> None:
    model.get_parameter("2.weight").grad = None


def zero(model: nn.Module) -> None:
    gradient = model.get_parameter("2.weight").grad
    assert gradient is not None
    gradient.zero_()


def replace(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.125).cumsum(0)


def add(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.add_(parameter.detach(), alpha=0.1)


CHANGES: dict[str, Change] = {
    "clipped": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
    "scaled": scale,
    "none": freeze,
    "zeroed": zero,
    "replaced": replace,
    "added to": add,
}
FEEDBACK: dict[str, Any] = {"plain": None, "anticipate": Anticipate(), "step ahead": StepAhead()}


def make(comm: Communicator, compressor: Compressor, feedback: Any = None) -> tuple[nn.Sequential, Any]:
    model = net()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return model, DistributedOptimizer(inner, model.named_parameters(), compressor, comm=comm, error_feedback=feedback)


@contextmanager
def ahead(optimizer: Any) -> Iterator[None]:
    with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
        yield


def set_by_hand(model: nn.Module, gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


def changed(comm: Communicator, compressor: Compressor, feedback: Any, change: Change) -> tuple[Tensor, Tensor]:
    """The model after steps whose gradients were changed, and after the same gradients, set without a backward."""
    model, optimizer = make(comm, compressor, feedback)
    reference, expected = make(comm, compressor, feedback)
    for step in range(STEPS):
        optimizer.zero_grad()
        with ahead(optimizer):
            loss(model, comm.rank, step).backward()
        change(model)
        gradients = [copy.copy(parameter.grad) for parameter in model.parameters()]
        gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
        optimizer.step()
        set_by_hand(reference, gradients)
        expected.step()
    return flat(model), flat(reference)


@EVERY
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_done_to_gradients_before_the_step_counts(compressor: Compressor, change: Change) -> None:
    def body(comm: Communicator) -> Any:
        try:
            return changed(comm, compressor, None, change)
        except ConfigurationError as error:
            return str(error)

    seen = run_in_process(SIZE, body)
    if compressor in STREAMING:
        assert all("was changed after backward() had handed it to a bucket that is under way" in text for text in seen)
        assert all("change gradients after optimizer.synchronize()" in text for text in seen)
        return
    for model, reference in seen:
        assert torch.equal(model, reference)
    assert torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("feedback", list(FEEDBACK.values())[1:], ids=list(FEEDBACK)[1:])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_with_error_feedback_as_well(feedback: Any, change: Change) -> None:
    for model, reference in run_in_process(SIZE, lambda comm: changed(comm, SHARDED, feedback, change)):
        assert torch.equal(model, reference)


@pytest.mark.parametrize("compressor", STREAMING)
def test_after_synchronize_gradients_that_were_sent_in_backward_may_be_changed(compressor: Compressor) -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        model, optimizer = make(comm, compressor)
        plain = copy.deepcopy(model)
        steps = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, comm.rank, step).backward()
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            gradients = [parameter.grad for parameter in model.parameters()]
            set_by_hand(plain, [None if gradient is None else gradient.clone() for gradient in gradients])
            with optimizer.skip_synchronize():
                optimizer.step()
            steps.step()
        return flat(model), flat(plain)

    for model, plain in run_in_process(SIZE, body):
        assert torch.equal(model, plain)


class Abandoned(Exception):
    """In the middle of backward."""


def fail(gradient: Tensor) -> Tensor:
    raise Abandoned


def in_the_middle(optimizer: Any, model: Any, rank: int, step: int) -> None:
    """Backward fails behind the last layer, on all ranks; some gradients are there then."""
    handle = model[0].weight.register_hook(fail)
    with suppress(Abandoned), ahead(optimizer):
        loss(model, rank, step).backward()
    handle.remove()
    optimizer.zero_grad()


def backward(optimizer: Any, model: nn.Module, rank: int, step: int) -> None:
    with ahead(optimizer):
        loss(model, rank, step).backward()


def discarded(optimizer: Any, model: nn.Module, rank: int, step: int) -> None:
    backward(optimizer, model, rank, step)
    optimizer.discard()


def cleared(optimizer: Any, model: nn.Module, rank: int, step: int) -> None:
    backward(optimizer, model, rank, step)
    optimizer.zero_grad()


def synchronized_and_cleared(optimizer: Any, model: nn.Module, rank: int, step: int) -> None:
    backward(optimizer, model, rank, step)
    optimizer.synchronize()
    optimizer.zero_grad()


WAYS = {
    "an error in backward": in_the_middle,
    "discard": discarded,
    "zero_grad": cleared,
    "synchronize, zero_grad": synchronized_and_cleared,
}


def trained(comm: Communicator, compressor: Compressor, feedback: Any, throw_away: Any) -> tuple[Tensor, Tensor]:
    model, optimizer = make(comm, compressor, feedback)
    for step in range(STEPS):
        if throw_away is not None:
            throw_away(optimizer, model, comm.rank, 50 + step)
        optimizer.zero_grad()
        backward(optimizer, model, comm.rank, step)
        optimizer.step()
    return flat(model), optimizer.exchange.memory.residual.clone()


@EVERY
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_gradients_that_are_thrown_away_leave_no_trace(compressor: Compressor, way: Any) -> None:
    """A bucket that was under way makes a void step of it, on all ranks."""
    with_waste = run_in_process(SIZE, lambda comm: trained(comm, compressor, None, way))
    without = run_in_process(SIZE, lambda comm: trained(comm, compressor, None, None))
    for (model, memory), (expected, kept) in zip(with_waste, without, strict=True):
        assert torch.equal(model, expected)
        assert torch.equal(memory, kept)


@pytest.mark.parametrize("feedback", list(FEEDBACK.values())[1:], ids=list(FEEDBACK)[1:])
@pytest.mark.parametrize("way", list(WAYS.values())[:3], ids=list(WAYS)[:3])
def test_with_error_feedback_they_leave_none_either(feedback: Any, way: Any) -> None:
    with_waste = run_in_process(SIZE, lambda comm: trained(comm, SHARDED, feedback, way))
    without = run_in_process(SIZE, lambda comm: trained(comm, SHARDED, feedback, None))
    for (model, memory), (expected, kept) in zip(with_waste, without, strict=True):
        assert torch.equal(model, expected)
        assert torch.equal(memory, kept)
