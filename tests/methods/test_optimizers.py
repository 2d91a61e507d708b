"""What a method returns is an optimizer of the user's class, with all that it offers, also for unusual loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel

from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from tests.support.compressors import EVERY as EVERY_COMPRESSOR
from tests.support.compressors import SHARDED
from tests.support.methods import EVERY, METHODS, Method, adamw, exchanging, fresh, plain_sgd
from tests.support.training import flat, loss, net

EXCHANGING = {name: METHODS[name] for name in ("exchange", "anticipate", "step ahead")}
EACH = pytest.mark.parametrize("method", EXCHANGING.values(), ids=EXCHANGING)


class Own(torch.optim.SGD):
    """A user's class: with a mode, a keyword of its own, and an attribute."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.mode, self.gains = "train", list[float]()

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def step(self, closure: Any = None, gain: float = 1.0) -> Any:
        self.gains.append(gain)
        return super().step(closure)


@contextmanager
def ahead(optimizer: Any) -> Iterator[None]:
    with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
        yield


def step(optimizer: Any, model: nn.Module, rank: int, number: int) -> None:
    optimizer.zero_grad()
    with ahead(optimizer):
        loss(model, rank, number).backward()
    optimizer.step()


def wrapped(method: Method, comm: Communicator, make: Callable[[Any], Any]) -> tuple[nn.Module, Any, Any]:
    model = net()
    inner = make(model.parameters())
    return model, inner, method.make(inner, model, comm)


@EVERY
def test_it_is_an_instance_of_the_users_class_with_all_it_offers(method: Method) -> None:
    if method in (METHODS["decentlam"], METHODS["lead"]) or method.optimizer is adamw:
        pytest.skip("it serves SGD itself alone")
    own: Callable[[Any], Any] = lambda parameters: Own(parameters, 0.05)  # noqa: E731

    def body(comm: Communicator) -> None:
        model, inner, optimizer = wrapped(method, comm, own)
        assert isinstance(optimizer, Own)
        assert type(optimizer).__name__ == "Own"
        optimizer.eval()
        assert inner.mode == optimizer.mode == "eval"
        optimizer.train()
        for gain in (2.0, 3.0):
            optimizer.zero_grad()
            with ahead(optimizer):
                loss(model, comm.rank, 0).backward()
            optimizer.step(gain=gain)
        assert inner.gains == [2.0, 3.0]
        assert optimizer.state is inner.state

    run_in_process(2, body)


@EVERY
def test_schedulers_made_before_and_after_wrapping_set_the_rate_also_after_a_load(method: Method) -> None:
    if method is METHODS["lead"]:
        pytest.skip("its rate is constant by its theory")

    def body(comm: Communicator) -> None:
        model = net()
        inner = method.optimizer(model.parameters())
        before = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
        optimizer = method.make(inner, model, comm)
        after = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        rate = inner.param_groups[0]["lr"]
        step(optimizer, model, comm.rank, 0)
        before.step()
        after.step()
        assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"] == pytest.approx(rate / 4)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before.step()
        after.step()
        assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"] == pytest.approx(rate / 16)
        assert optimizer.param_groups is inner.param_groups

    run_in_process(2, body)


@EACH
def test_averages_of_the_model_and_their_schedule(method: Method) -> None:
    """`torch.optim.swa_utils`: means of x, and of nothing that was stepped ahead."""

    def body(comm: Communicator) -> None:
        model, optimizer = fresh(method, comm)
        averaged, schedule = AveragedModel(model), SWALR(optimizer, swa_lr=0.02)
        seen = []
        for number in range(4):
            step(optimizer, model, comm.rank, number)
            averaged.update_parameters(model)
            schedule.step()
            seen.append(flat(model))
        torch.testing.assert_close(flat(averaged.module), torch.stack(seen).mean(0))

    run_in_process(2, body)


def both(method: Method, train: Callable[[Any, nn.Module, int, bool], None]) -> list[tuple[Tensor, Tensor]]:
    """On each rank the model after an unusual training and after the plain one it must equal."""

    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        ends = []
        for unusual in (True, False):
            model, optimizer = fresh(method, comm)
            train(optimizer, model, comm.rank, unusual)
            ends.append(flat(model))
        return ends[0], ends[1]

    return run_in_process(2, body)


@EACH
def test_gradients_may_be_set_by_hand(method: Method) -> None:
    def train(optimizer: Any, model: nn.Module, rank: int, by_hand: bool) -> None:
        for number in range(4):
            optimizer.zero_grad()
            with ahead(optimizer):
                value = loss(model, rank, number)
                if by_hand:
                    found = torch.autograd.grad(value, list(model.parameters()))
                    for parameter, gradient in zip(model.parameters(), found, strict=True):
                        parameter.grad = gradient
                else:
                    value.backward()
            optimizer.step()

    assert all(torch.equal(*ends) for ends in both(method, train))


@EACH
def test_graphs_of_gradients_may_be_made(method: Method) -> None:
    """``create_graph=True``: a penalty on the gradient's norm, and a second backward through it."""

    def train(optimizer: Any, model: nn.Module, rank: int, at_once: bool) -> None:
        for number in range(4):
            optimizer.zero_grad()
            with ahead(optimizer):
                value = loss(model, rank, number)
                if at_once:
                    found = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
                    penalty = sum(gradient.square().sum() for gradient in found)
                    (value + 0.1 * penalty).backward()
                else:
                    value.backward(create_graph=True)
                    first = [parameter.grad for parameter in model.parameters()]
                    optimizer.zero_grad()
                    penalty = sum(gradient.square().sum() for gradient in first if gradient is not None)
                    (loss(model, rank, number) + 0.1 * penalty).backward()
            optimizer.step()

    for ends in both(method, train):
        torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@EACH
def test_a_closure_is_evaluated_once_and_exchanged(method: Method) -> None:
    def train(optimizer: Any, model: nn.Module, rank: int, by_closure: bool) -> None:
        def closure(number: int) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, rank, number)
            value.backward()
            return value

        for number in range(4):
            if by_closure:
                value = optimizer.step(lambda number=number: closure(number))
                assert value is not None
            else:
                step(optimizer, model, rank, number)

    assert all(torch.equal(*ends) for ends in both(method, train))


class Tied(nn.Module):
    """Two layers with one weight, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(40, 40), nn.Linear(40, 40, bias=False)
        nn.init.eye_(self.encode.weight)
        nn.init.zeros_(self.encode.bias)
        self.decode.weight = self.encode.weight

    def forward(self, batch: Tensor) -> Tensor:
        result: Tensor = self.decode(torch.tanh(self.encode(batch)))
        return result


@EACH
def test_tied_weights_train_as_one(method: Method) -> None:
    """Given under both names or under one: the gradient is the sum of both uses."""

    def body(comm: Communicator) -> list[Tensor]:
        ends = []
        for twice in (False, True):
            model = Tied()
            named = list(model.named_parameters(remove_duplicate=not twice))
            inner = torch.optim.SGD(model.parameters(), 0.05)
            model.named_parameters = lambda *_, named=named, **__: iter(named)  # type: ignore[method-assign]
            optimizer: Any = method.make(inner, model, comm)
            for number in range(4):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(10 * number + comm.rank)
                with ahead(optimizer):
                    (model(torch.randn(8, 40, generator=generator)) - 1.0).square().mean().backward()
                optimizer.step()
            ends.append(model.encode.weight.detach().clone())
            assert model.decode.weight is model.encode.weight
        return ends

    first, second = run_in_process(2, body)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], first[1])


@EVERY_COMPRESSOR
def test_two_passes_of_sharpness_aware_minimization_send_the_second_one_alone(compressor: Any) -> None:
    """The gradient of the first pass is used and cleared; parameters go there and back in between."""

    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        ends = []
        for sharp in (True, False):
            model, optimizer = fresh(Method(exchanging(compressor), plain_sgd), comm)
            for number in range(4):
                moves = [torch.full_like(parameter, 1e-3) for parameter in model.parameters()]
                if sharp:
                    loss(model, comm.rank, 70 + number).backward()
                with torch.no_grad():
                    before = [parameter.clone() for parameter in model.parameters()]
                    for parameter, move in zip(model.parameters(), moves, strict=True):
                        parameter.add_(move)
                optimizer.zero_grad()
                loss(model, comm.rank, number).backward()
                with torch.no_grad():
                    for parameter, value in zip(model.parameters(), before, strict=True):
                        parameter.copy_(value)
                optimizer.step()
                optimizer.zero_grad()
            ends.append(flat(model))
        return ends[0], ends[1]

    assert all(torch.equal(*ends) for ends in run_in_process(2, body))


@EVERY_COMPRESSOR
def test_of_two_optimizers_on_one_model_the_older_one_takes_nothing(compressor: Any) -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor, float]:
        model, older = fresh(Method(exchanging(compressor), plain_sgd), comm)
        step(older, model, comm.rank, 0)
        kept = older.exchange.memory.residual.clone()
        newer = exchanging(compressor)(torch.optim.SGD(model.parameters(), 0.05), model, comm)
        alone = copy.deepcopy(model)
        expected = exchanging(compressor)(torch.optim.SGD(alone.parameters(), 0.05), alone, comm)
        for number in range(3):
            step(newer, model, comm.rank, number)
            step(expected, alone, comm.rank, number)
        return flat(model), flat(alone), float((older.exchange.memory.residual - kept).abs().max())

    for model, alone, moved in run_in_process(2, body):
        assert torch.equal(model, alone)
        assert moved == 0.0


def test_parameters_may_be_changed_inside_forward() -> None:
    """Spectral normalization and the like change buffers; some change the weight itself: that is kept."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()
            self.weight: Any = self.inner[0].weight

        def forward(self, batch: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.05, 0.05)
            result: Tensor = self.inner(batch)
            return result

    model = Clamped()
    optimizer = exchanging(SHARDED)(torch.optim.SGD(model.parameters(), 1e-9), model, SingleProcess())
    for number in range(3):
        optimizer.zero_grad()
        loss(model, 0, number).backward()
        optimizer.step()
    assert float(model.weight.detach().abs().max()) == pytest.approx(0.05)
