"""`DistributedOptimizer` in one process: what wrapping keeps of an optimizer, and Horovod's manners."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch
from hvd_sketch import Compression, ConfigurationError, DistributedOptimizer, SingleProcess
from tests.support.training import COMPRESSED, TOTAL, flat, flat_gradient, loss, net, train

SKETCH = Compression.sketch(ratio=10.0, warmup_steps=0)
EVERYTHING = Compression.sketch(cols=COMPRESSED, k=COMPRESSED, half=False, clip_norm=None)


def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, compression: Any = SKETCH, **keywords: Any) -> Any:
    return DistributedOptimizer(optimizer, model.named_parameters(), compression, comm=SingleProcess(), **keywords)


def sketched(compression: Any = SKETCH, lr: float = 0.1, **keywords: Any) -> tuple[nn.Sequential, Any]:
    model = net()
    return model, wrap(torch.optim.SGD(model.parameters(), lr), model, compression, **keywords)


def assert_same_training(
    make_optimizer: Callable[[Any], torch.optim.Optimizer], steps: int = 15, **keywords: Any
) -> None:
    """Sending everything must equal the plain optimizer to rounding."""
    plain, wrapped = net(), net()
    expected = train(make_optimizer(plain.parameters()), plain, steps)
    for compression in (EVERYTHING, Compression.sketch(schedule=lambda step: 1.0, clip_norm=None)):
        wrapped.load_state_dict(net().state_dict())
        optimizer = wrap(make_optimizer(wrapped.parameters()), wrapped, compression, **keywords)
        torch.testing.assert_close(train(optimizer, wrapped, steps), expected, rtol=1e-5, atol=1e-6)
        assert not optimizer.exchange.memory.residual.any()


SGD_SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=str)
def test_sending_everything_is_sgd(settings: dict[str, Any]) -> None:
    """The fifteen, item 12: k = d reproduces dense SGD to rounding."""
    assert_same_training(lambda parameters: torch.optim.SGD(parameters, 0.1, **settings))


@pytest.mark.parametrize("settings", SGD_SETTINGS[2:], ids=str)
def test_sending_everything_with_momentum_correction_is_sgd(settings: dict[str, Any]) -> None:
    """The fifteen, item 12: also with momentum and weight decay before the memory, in the right order."""
    assert_same_training(
        lambda parameters: torch.optim.SGD(parameters, 0.1, **settings),
        momentum_correction=True,
        momentum_masking=False,
    )


def test_momentum_correction_reads_the_groups_of_a_loaded_state() -> None:
    """Loading replaces the groups: weight decay must be theirs."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.3)

    state = make(net().parameters()).state_dict()
    plain, wrapped = net(), net()
    expected = train(make(plain.parameters()), plain, 8)
    without_decay = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    optimizer = wrap(without_decay, wrapped, EVERYTHING, momentum_correction=True, momentum_masking=False)
    optimizer.load_state_dict(state)
    torch.testing.assert_close(train(optimizer, wrapped, 8), expected, rtol=1e-5, atol=1e-6)


def test_momentum_correction_leaves_parameters_without_gradient_alone() -> None:
    """As plain PyTorch does: also their weight decay."""
    plain, wrapped = net(), net()

    def steps(optimizer: Any, model: nn.Sequential) -> Tensor:
        for _ in range(4):
            optimizer.zero_grad()
            model[0](torch.ones(2, 30)).square().mean().backward()
            optimizer.step()
        return flat(model)

    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    expected = steps(torch.optim.SGD(plain.parameters(), **settings), plain)
    optimizer = wrap(
        torch.optim.SGD(wrapped.parameters(), **settings),
        wrapped,
        EVERYTHING,
        momentum_correction=True,
        momentum_masking=False,
    )
    for _ in range(4):
        optimizer.zero_grad()
        wrapped[0](torch.ones(2, 30)).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(flat(wrapped), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_sending_everything_is_adam(kind: type[torch.optim.Optimizer]) -> None:
    assert_same_training(lambda parameters: kind(parameters, lr=0.01, weight_decay=0.1))  # type: ignore[call-arg]


def test_an_explicit_communicator_compresses_in_a_single_process() -> None:
    model, optimizer = sketched()
    train(optimizer, model, 3)
    assert optimizer.exchange.stats.steps == 3
    assert 0 < int(flat_gradient(model).count_nonzero()) < TOTAL // 2


class Scaled(torch.optim.SGD):
    """An optimizer whose constructor wants more, and which keeps more."""

    def __init__(self, params: Any, *, strength: float) -> None:
        super().__init__(params, lr=0.1)
        self.strength = strength

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(self.strength)
        return super().step(closure)


def test_the_class_and_everything_in_it_is_kept() -> None:
    """The fifteen, item 8: Horovod's module name, and one class level above the user's."""
    model = net()
    plain = Scaled(model.parameters(), strength=0.5)
    train(plain, model, 1)
    optimizer: Any = wrap(plain, model)
    assert issubclass(type(optimizer), Scaled)
    assert type(optimizer).__name__ == "Scaled"
    assert type(optimizer).__module__ == "horovod.torch.optimizer"
    assert optimizer.strength == 0.5
    assert optimizer.defaults == plain.defaults
    assert optimizer.param_groups is plain.param_groups
    before, model_gradient = flat(model), None
    optimizer.zero_grad()
    loss(model, 0, 1).backward()
    optimizer.synchronize()
    model_gradient = flat_gradient(model)
    optimizer.step()
    torch.testing.assert_close(flat(model), before - 0.1 * 0.5 * model_gradient)


def test_nothing_per_rank_is_in_the_optimizer_state() -> None:
    """The fifteen, item 8: ``broadcast_optimizer_state`` copies all of it to every rank."""
    model = net()
    optimizer = wrap(torch.optim.Adam(model.parameters()), model)
    train(optimizer, model, 3)
    plain = net()
    reference = torch.optim.Adam(plain.parameters())
    train(reference, plain, 3)
    state, expected = optimizer.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    assert all(state["state"][index].keys() == entry.keys() for index, entry in expected["state"].items())


def test_state_from_before_wrapping_stays() -> None:
    model, reference = net(), net()
    plain = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    expected_optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    train(plain, model, 3)
    expected = train(expected_optimizer, reference, 6)
    torch.testing.assert_close(train(wrap(plain, model, EVERYTHING), model, range(3, 6)), expected)


def test_state_dict_loads_into_a_plain_optimizer_and_with_weights_only() -> None:
    """The fifteen, item 7."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)
    train(optimizer, model, 3)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "memory": optimizer.memory_state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    plain = torch.optim.SGD(net().parameters(), 0.2, momentum=0.9)
    plain.load_state_dict(saved["optimizer"])
    assert plain.param_groups[0]["lr"] == 0.1
    buffers = [entry["momentum_buffer"] for entry in plain.state_dict()["state"].values()]
    originals = [entry["momentum_buffer"] for entry in optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(buffers, originals, strict=True))


def test_loading_a_state_forgets_gradients_in_flight_and_the_memory() -> None:
    model, optimizer = sketched()
    fresh, expected = sketched()
    state = copy.deepcopy(optimizer.state_dict())
    train(optimizer, model, 2)
    loss(model, 0, 2).backward()
    optimizer.load_state_dict(state)
    assert not optimizer.exchange.memory.residual.any()
    model.load_state_dict(fresh.state_dict())
    optimizer.zero_grad()
    model[0](torch.ones(2, 30)).square().mean().backward()
    fresh[0](torch.ones(2, 30)).square().mean().backward()
    optimizer.flush()
    expected.flush()
    optimizer.step()
    expected.step()
    assert torch.equal(flat(model), flat(fresh))


def test_learning_rate_schedules_from_before_and_after_wrapping_work() -> None:
    model = net()
    plain = torch.optim.SGD(model.parameters(), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)
        optimizer = wrap(plain, model)
        after = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
        train(optimizer, model, 1)
        after.step()
        train(optimizer, model, 1)
        before.step()  # it watches the plain optimizer, which is stepped
    assert optimizer.param_groups[0]["lr"] == 0.5
    moved = flat(model)
    train(optimizer, model, range(2, 3))
    torch.testing.assert_close(moved - flat(model), 0.5 * flat_gradient(model))


def test_step_hooks_fire_once() -> None:
    """Horovod's own optimizer fires them twice."""
    model, optimizer = sketched()
    fired = []
    optimizer.register_step_pre_hook(lambda *args: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *args: fired.append("post"))
    train(optimizer, model, 1)
    assert fired == ["pre", "post"]


def test_synchronize_twice_is_synchronize_once() -> None:
    """The fifteen, item 5."""
    model, optimizer = sketched()
    reference, expected = sketched()
    for number in range(3):
        for m, o, calls in ((model, optimizer, 2), (reference, expected, 1)):
            o.zero_grad()
            loss(m, 0, number).backward()
            for _ in range(calls):
                o.synchronize()
            with o.skip_synchronize():
                o.step()
    assert torch.equal(flat(model), flat(reference))
    assert optimizer.exchange.stats.steps == 3


def test_step_after_synchronize_warns_in_horovods_words_and_changes_nothing() -> None:
    model, optimizer = sketched()
    reference, expected = sketched()
    loss(model, 0, 0).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match=r"called without optimizer.skip_synchronize\(\) context after"):
        optimizer.step()
    train(expected, reference, 1)
    assert torch.equal(flat(model), flat(reference))


def test_clipping_between_synchronize_and_step_holds() -> None:
    model, optimizer = sketched()
    before = flat(model)
    loss(model, 0, 0).backward()
    optimizer.synchronize()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    kept = optimizer.exchange.memory.residual.clone()
    with optimizer.skip_synchronize():
        optimizer.step()
    assert float((flat(model) - before).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert torch.equal(optimizer.exchange.memory.residual, kept)


@pytest.mark.parametrize("how", ["zero_grad", "discard", "model", "synchronize, zero_grad", "synchronize, model"])
def test_gradients_that_are_thrown_away_leave_no_trace(how: str) -> None:
    # that the model was zeroed is seen after the next forward, which has stepped ahead by then
    feedback: dict[str, Any] = {"error_feedback": None} if how == "synchronize, model" else {}
    model, optimizer = sketched(**feedback)
    reference, expected = sketched(**feedback)
    for number in range(4):
        loss(model, 0, 10 + number).backward()
        if "synchronize" in how:
            optimizer.synchronize()
        if how.endswith("model"):
            model.zero_grad()
        elif how == "discard":
            optimizer.discard()
        else:
            optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        loss(model, 0, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(flat(model), train(expected, reference, 4))
    assert torch.equal(optimizer.exchange.memory.residual, expected.exchange.memory.residual)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_set_to_none(set_to_none: bool) -> None:
    """The fifteen, item 5: a TypeError in Horovod's own optimizer. Both ways train alike."""
    model, optimizer = sketched()
    reference, expected = sketched()
    for number in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((parameter.grad is None) is (set_to_none or not number) for parameter in model.parameters())
        loss(model, 0, number).backward()
        optimizer.step()
    assert torch.equal(flat(model), train(expected, reference, 4))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_model_zero_grad_will_do(set_to_none: bool) -> None:
    model, optimizer = sketched()
    reference, expected = sketched()
    for number in range(4):
        loss(model, 0, number).backward()
        optimizer.step()
        model.zero_grad(set_to_none=set_to_none)
    assert torch.equal(flat(model), train(expected, reference, 4))


def test_backward_passes_add_up_until_the_exchange() -> None:
    model, optimizer = sketched(backward_passes_per_step=2)
    reference, expected = sketched()
    for number in (0, 2):
        optimizer.zero_grad()
        expected.zero_grad()
        for part in range(2):
            loss(model, 0, number + part).backward()
        sum(loss(reference, 0, number + part) for part in range(2)).backward()  # type: ignore[union-attr]
        optimizer.step()
        expected.step()
    torch.testing.assert_close(flat(model), flat(reference), rtol=1e-5, atol=1e-6)


def test_nobody_needs_to_tell_of_several_backward_passes() -> None:
    """Stock Horovod refuses them then."""
    told, untold = sketched(backward_passes_per_step=3), sketched()
    for model, optimizer in (told, untold):
        for part in range(3):
            loss(model, 0, part).backward()
        optimizer.step()
    assert torch.equal(flat(told[0]), flat(untold[0]))


def test_a_step_before_the_last_backward_pass_takes_what_is_there() -> None:
    model, optimizer = sketched(backward_passes_per_step=3)
    reference, expected = sketched()
    assert torch.equal(train(optimizer, model, 4), train(expected, reference, 4))


def test_more_passes_while_gradients_wait_are_one_gradient() -> None:
    model, optimizer = sketched(EVERYTHING)
    loss(model, 0, 0).backward()
    optimizer.set_backward_passes_per_step(2)
    loss(model, 0, 1).backward()
    expected = flat_gradient(model)
    optimizer.synchronize()
    torch.testing.assert_close(flat_gradient(model), expected)


def test_a_closure_takes_part() -> None:
    """The fifteen, item 5: Horovod's own optimizer steps on local gradients then."""
    model, optimizer = sketched()
    reference, expected = sketched()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, 0, 0)
        value.backward()
        return value

    returned = optimizer.step(closure)
    assert torch.equal(returned, loss(net(), 0, 0))
    assert torch.equal(flat(model), train(expected, reference, 1))


def test_optimizers_that_reevaluate_their_closure_are_refused() -> None:
    model = net()
    with pytest.raises(ConfigurationError, match="LBFGS evaluates its closure several times"):
        wrap(torch.optim.LBFGS(model.parameters()), model)


def test_a_new_parameter_group_is_refused_and_wrapping_again_is_the_remedy() -> None:
    """The fifteen, item 5."""
    model = net()
    plain = torch.optim.SGD(model[2].parameters(), 0.1)
    optimizer = wrap(plain, model)
    train(optimizer, model, 2)
    with pytest.raises(ConfigurationError, match="add_param_group after .*wrap it again"):
        optimizer.add_param_group({"params": list(model[0].parameters())})
    plain.add_param_group({"params": list(model[0].parameters())})
    optimizer = wrap(plain, model)
    before = flat(model)
    train(optimizer, model, range(2, 4))
    assert optimizer.exchange.layout.total == TOTAL
    assert int((flat(model) - before)[: 30 * 60].count_nonzero()) > 0


def test_wrapping_twice_is_refused() -> None:
    model, optimizer = sketched()
    with pytest.raises(ConfigurationError, match="already a DistributedOptimizer"):
        wrap(optimizer, model)


def test_channels_last_gradients_keep_their_strides() -> None:
    model = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    reference = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    gradients = []
    for module in (model, reference):
        optimizer = wrap(torch.optim.SGD(module.parameters(), 0.1), module)
        inputs = torch.arange(2 * 16 * 8 * 8.0).view(2, 16, 8, 8).sin()
        module(inputs.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        gradients.append(module.weight.grad)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    assert not gradients[0].is_contiguous()
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_other_precisions_get_updates_of_theirs(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    model(torch.ones(4, 30, dtype=dtype)).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.dtype == dtype for parameter in model.parameters())
    assert optimizer.exchange.memory.residual.dtype == torch.float32
    assert flat(model).isfinite().all()


def test_sparse_gradients_can_travel_as_dense_ones() -> None:
    models = [nn.Embedding(100, 20, sparse=sparse) for sparse in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    for number in range(3):
        for model in models:
            if number == 0:
                model.optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model, sparse_as_dense=True)
            optimizer: Any = model.optimizer
            optimizer.zero_grad()
            model(torch.tensor([number, 5, 5, 7])).square().sum().backward()
            optimizer.step()
            assert model.weight.grad is not None
            assert model.weight.grad.is_sparse is model.sparse
    assert torch.equal(models[0].weight, models[1].weight)


def test_a_gradient_scaler_may_change_its_scale() -> None:
    """The fifteen, item 6: the memory is in the gradient's own units, so a new scale does not change what it holds."""
    model, optimizer = sketched(grad_scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=2.0**10)))
    reference, expected = sketched()
    for number in range(6):
        optimizer.zero_grad()
        scaler.scale(loss(model, 0, number)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update(2.0 ** (4 * number % 11))
    assert torch.equal(flat(model), train(expected, reference, 6))


def test_the_scale_is_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it waits for the scaler's device, which no hook may do for each parameter."""
    model, optimizer = sketched(grad_scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=2.0**10)))
    read: list[float] = []

    def get_scale() -> float:
        read.append(2.0**10)
        return read[-1]

    monkeypatch.setattr(scaler, "get_scale", get_scale)
    for number in range(3):
        optimizer.zero_grad()
        scaler.scale(loss(model, 0, number)).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    assert len(read) == 3


def test_an_overflow_skips_the_step_and_leaves_the_memory() -> None:
    """The fifteen, item 6."""
    model, optimizer = sketched(grad_scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=2.0**10)))
    for number in range(4):
        before, kept = flat(model), optimizer.exchange.memory.residual.clone()
        optimizer.zero_grad()
        scaled = scaler.scale(loss(model, 0, number))
        (scaled * float("inf") if number == 2 else scaled).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        same = torch.equal(flat(model), before), torch.equal(optimizer.exchange.memory.residual, kept)
        assert same == ((True, True) if number == 2 else (False, False))
    assert scaler.get_scale() == 2.0**9
    assert optimizer.exchange.stats.skipped == 1


def test_the_wrapped_optimizer_is_freed_with_its_last_reference() -> None:
    """Hooks on the parameters must not keep the memory of a model's size alive."""
    import gc
    import weakref

    model, optimizer = sketched()
    train(optimizer, model, 1)
    exchange = weakref.ref(optimizer.exchange)
    del optimizer
    gc.collect()
    assert exchange() is None
    loss(model, 0, 1).backward()


def test_the_readmes_names_are_there() -> None:
    assert {"DistributedOptimizer", "Compression", "Sum", "Average", "Stats"} <= set(hvd_sketch.__all__)
