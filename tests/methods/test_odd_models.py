"""Odd parameters, and copies: every method trains them right, or says what to do."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hvd_sketch as hvd
from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from tests.support import compressors
from tests.support.methods import EVERY, METHODS, Method, exchanging, fresh, shared, train
from tests.support.training import flat, net

ADAPTIVE = Method(
    lambda inner, model, comm: hvd.DistributedOptimizer(
        inner, model.named_parameters(), Compression.sketch(schedule=hvd.EnergyTarget(0.9), dense_below=100), comm=comm
    )
)


class Odd(nn.Module):
    """Parameters without dimensions, without elements, of four precisions, and two that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.one = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(1))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.in_single, self.in_double = nn.Linear(40, 120), nn.Linear(120, 60).double()
        self.in_half, self.in_brain = nn.Linear(60, 50).half(), nn.Linear(50, 40).bfloat16()
        self.unused, self.unused_scale = nn.Linear(30, 30), nn.Parameter(torch.tensor(2.5))

    def forward(self, batch: Tensor) -> Tensor:
        hidden = torch.tanh(self.in_single(batch)) * self.scale * self.one + self.empty.sum()
        hidden = torch.tanh(self.in_double(hidden.double())).float()
        hidden = torch.tanh(functional.linear(hidden, self.in_half.weight.float(), self.in_half.bias.float()))
        result: Tensor = self.in_brain(hidden.bfloat16()).float()
        return result


torch.manual_seed(0)
ODD = Odd()


def train_on(optimizer: Any, model: nn.Module, rank: int) -> None:
    """Four steps on batches of 40 values, whatever the default dtype."""
    for step in range(4):
        generator = torch.Generator("cpu").manual_seed(10 * step + rank)
        batch = torch.randn(8, 40, generator=generator, dtype=torch.float32, device="cpu")
        optimizer.zero_grad()
        with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
            model(batch).square().mean().backward()
        optimizer.step()


def train_odd(method: Method, comm: Communicator) -> tuple[Tensor, bool]:
    """The model in the end, and whether what nothing uses was left alone."""
    model = copy.deepcopy(ODD)
    inner = method.optimizer(model.parameters())
    for group in inner.param_groups:
        group["weight_decay"] = 0.1
        if "eps" in group:
            group["eps"] = 1e-4  # half precision takes Adam's own for zero
    optimizer = method.make(inner, model, comm)
    train_on(optimizer, model, comm.rank)
    unused = (model.unused.weight, ODD.unused.weight), (model.unused_scale, ODD.unused_scale)
    assert model.scale != ODD.scale
    return shared(optimizer, model), all(torch.equal(*pair) for pair in unused)


@EVERY
def test_every_method_trains_odd_parameters(method: Method) -> None:
    first, second = run_in_process(2, lambda comm: train_odd(method, comm))
    assert first[0].isfinite().all()
    assert torch.equal(first[0], second[0])
    gossip = (METHODS["decentlam"], METHODS["lead"])  # weight decay is part of what they exchange
    assert (first[1] and second[1]) or method in gossip


@compressors.EVERY
def test_every_compressor_trains_odd_parameters(compressor: Any) -> None:
    first, second = run_in_process(2, lambda comm: train_odd(Method(exchanging(compressor)), comm))
    assert first[0].isfinite().all()
    assert torch.equal(first[0], second[0])
    assert first[1]


@EVERY
def test_the_scripts_defaults_change_nothing(method: Method) -> None:
    """Of dtype and device; the meta device stands for another than the model's."""

    def end(set_default: Callable[[], None]) -> Tensor:
        model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 40))
        model.load_state_dict(plain.state_dict())
        inner = method.optimizer(model.parameters())
        try:
            set_default()
            optimizer = method.make(inner, model, SingleProcess())
            train_on(optimizer, model, 0)
            return shared(optimizer, model)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)

    plain = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 40))
    expected = end(lambda: None)
    for set_default in (
        partial(torch.set_default_dtype, torch.float64),
        partial(torch.set_default_dtype, torch.bfloat16),
        partial(torch.set_default_device, "meta"),
    ):
        assert torch.equal(end(set_default), expected)


def sharded(model: nn.Module) -> nn.Module:
    """As FSDP2 makes it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        torch.distributed.destroy_process_group()
    return model


UNFIT: dict[str, Callable[[], nn.Module]] = {
    "is lazy": lambda: nn.Sequential(nn.Linear(30, 50), nn.LazyLinear(40)),
    "is on the meta device": lambda: nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 40, device="meta")),
    "is a DTensor": lambda: sharded(net()),
}


@pytest.mark.parametrize("expected", UNFIT)
def test_parameters_that_are_not_there_are_refused_by_name(expected: str) -> None:
    model = UNFIT[expected]()
    name = "0.bias" if "DTensor" in expected else "1.bias"
    for method in METHODS.values():
        with pytest.raises(ConfigurationError, match=f"parameter '{name}' {expected}"):
            method.make(method.optimizer(model.parameters()), model, SingleProcess())
    with pytest.raises(ConfigurationError, match=expected):
        hvd.SwarmSGD(torch.optim.SGD(model.parameters(), 0.1), model=model)


@pytest.mark.parametrize("method", [*METHODS.values(), ADAPTIVE], ids=[*METHODS, "adaptive"])
def test_a_copy_goes_on_like_the_original(method: Method) -> None:
    def body(comm: Communicator) -> bool:
        model, optimizer = fresh(method, comm)
        train(optimizer, model, comm.rank, range(4))
        twin, copied = copy.deepcopy((model, optimizer))
        assert isinstance(copied, type(optimizer))
        train(optimizer, model, comm.rank, range(4, 9))
        train(copied, twin, comm.rank, range(4, 9))
        return torch.equal(flat(model), flat(twin))

    assert all(run_in_process(2, body))


@pytest.mark.parametrize("method", [*METHODS.values(), ADAPTIVE], ids=[*METHODS, "adaptive"])
def test_a_file_holds_model_and_optimizer(method: Method) -> None:
    model, optimizer = fresh(method, SingleProcess())
    train(optimizer, model, 0, range(4))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    twin, loaded, averaged = through_a_file((model, optimizer, average))
    assert type(loaded) is type(optimizer)
    assert loaded.param_groups[0]["params"][0] is next(twin.parameters())
    assert torch.equal(flat(twin), flat(model))
    assert torch.equal(flat(averaged), flat(average))
    if hasattr(optimizer, "average_model"):
        train(optimizer, model, 0, range(4, 9))
        train(loaded, twin, 0, range(4, 9))
        assert torch.equal(flat(twin), flat(model))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_swarm_node_cannot_be_copied() -> None:
    model = net()
    with hvd.SwarmSGD(torch.optim.SGD(model.parameters(), 0.1), model=model) as optimizer:
        for attempt in (copy.deepcopy, through_a_file):
            with pytest.raises(ConfigurationError, match="SwarmSGD cannot be copied or pickled"):
                attempt(optimizer)


def test_every_method_with_a_model_of_its_own_is_used_in_one_way() -> None:
    for method in METHODS.values():
        model, optimizer = fresh(method, SingleProcess())
        if not hasattr(optimizer, "average_model"):
            continue
        with optimizer:
            train(optimizer, model, 0, range(3))
            with optimizer.average_model() as mean:
                assert mean is model


def test_a_parameter_may_be_given_other_memory() -> None:
    """As `torch.nn.utils.vector_to_parameters` does."""
    model, optimizer = fresh(METHODS["local sgd"], SingleProcess())
    nn.utils.vector_to_parameters(torch.zeros_like(flat(model)), model.parameters())
    train(optimizer, model, 0, range(3))
    assert flat(model).abs().max() > 0.0
