"""Scripts with DistributedDataParallel as many people write them, to be run on all ranks, and what came of them."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

import hvd_sketch as hvd
from hvd_sketch import Compression
from tests.support.training import flat, loss, net

SIZE, STEPS, RATE = 2, 6, 0.125  # a power of two: no product with it is rounded
AHEAD: dict[str, Any] = {"ratio": 8.0, "warmup_steps": 0, "dense_below": 100, "clip_norm": None}
PLAIN: dict[str, Any] = {**AHEAD, "anticipate": False}


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, **settings)


def wrapped(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **settings)


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    loss(model, dist.get_rank(), number).backward()
    optimizer.step()


class Balance(NamedTuple):
    """What all ranks computed, on the mean, and what became of it: the difference of the two, and the sizes."""

    difference: float
    computed: float
    kept: float


def balance(model: nn.Module, start: Tensor, state: Any, computed: Tensor) -> Balance:
    """``computed``: the sum of this rank's gradients that count; plain SGD has stepped with what was sent."""
    kept = torch.zeros(computed.numel())
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    places = dict(zip(names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    for slot in state.exchange.layout.slots:
        place = places[slot.name]
        kept[place : place + slot.numel] = state.exchange.memory.residual[slot.offset : slot.stop]
    both = torch.stack([computed, kept])
    dist.all_reduce(both)
    both /= SIZE
    sent = (start - flat(model)) / RATE
    return Balance(float((both[0] - both[1] - sent).norm()), float(both[0].norm()), float(both[1].norm()))


def local_gradient(model: nn.Module, value: Tensor) -> Tensor:
    parameters = list(model.parameters())
    parts = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, parts, strict=True)]
    )


class Pair(nn.Module):
    """Two nets, whose outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = net(1), net(2)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.one(inputs) + self.other(inputs)
        return result


def two_optimizers() -> Balance:
    """Each steps its half of the model, in turn, together, or not at all; what it leaves is cleared."""
    inner = Pair()
    model = wrapped(inner)
    optimizers, half = [sgd(inner.one), sgd(inner.other)], flat(inner.one).numel()
    state = hvd.ddp.register(model, optimizers[1], Compression.topk(**PLAIN))
    start, computed = flat(model), torch.zeros(2 * half)
    for number in range(2 * STEPS):
        stepping = [at for at in range(2) if number % 4 in (at, 2)]
        gradient = local_gradient(inner, loss(inner, dist.get_rank(), number))
        for at in stepping:
            computed[at * half :][:half] += gradient[at * half :][:half]
        loss(model, dist.get_rank(), number).backward()
        for at in stepping:
            optimizers[at].step()
        model.zero_grad()
    state.memory_state_dict()
    return balance(inner, start, state, computed)


def two_models() -> Balance:
    """Of one optimizer, that is; each is computed alone, both together, or both in one pass, in turn."""
    inner = Pair()
    models, optimizer = [wrapped(inner.one), wrapped(inner.other)], sgd(inner)
    states = [hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN)) for model in models]
    start, half = flat(inner), flat(inner.one).numel()
    computed = torch.zeros(2 * half)
    for number in range(2 * STEPS):
        optimizer.zero_grad()
        used = [at for at in range(2) if number % 4 in (at, 2, 3)]
        for at in used:
            its = (inner.one, inner.other)[at]
            computed[at * half :][:half] += local_gradient(its, loss(its, dist.get_rank(), number))
        losses = [loss(models[at], dist.get_rank(), number) for at in used]
        for each in [torch.stack(losses).sum()] if number % 4 == 3 else losses:
            each.backward()
        optimizer.step()
    parts = [
        balance(its, start[at * half :][:half], states[at], computed[at * half :][:half])
        for at, its in enumerate((inner.one, inner.other))
    ]
    return max(parts, key=lambda part: part.difference / part.computed)


def thrown_away(throw_away: Callable[[nn.Module], None]) -> Balance:
    """The gradients of every third step, before it."""
    inner = net()
    model = wrapped(inner)
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    start, computed = flat(model), torch.zeros(flat(model).numel())
    for number in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, dist.get_rank(), number)
        value.backward()
        if number % 3 == 1:
            throw_away(model)
        else:
            computed += local_gradient(inner, loss(inner, dist.get_rank(), number))
        optimizer.step()
    return balance(inner, start, state, computed)


def another_optimizer() -> Balance:
    """Takes the place of the one that was given, in the middle of the training."""
    inner = net()
    model = wrapped(inner)
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    start, computed = flat(model), torch.zeros(flat(model).numel())
    for number in range(STEPS):
        optimizer = sgd(model) if number == STEPS // 2 else optimizer
        computed += local_gradient(inner, loss(inner, dist.get_rank(), number))
        step(model, optimizer, number)
    return balance(inner, start, state, computed)


def anticipating_for_another() -> Tensor:
    """The same where gradients were anticipated for the first one, which is gone."""
    model = wrapped(net())
    hvd.ddp.register(model, sgd(model), Compression.sharded(**AHEAD))
    for number in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for each in range(number * STEPS, (number + 1) * STEPS):
            step(model, optimizer, each)
    return flat(model)


def looking_around() -> Balance:
    """Sharpness-aware minimization: the gradient is taken where each rank's own first pass has shown it to."""
    inner = net()
    model = wrapped(inner)
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    start, computed = flat(model), torch.zeros(flat(model).numel())
    for number in range(STEPS):
        with model.no_sync():
            loss(model, dist.get_rank(), number).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=0.05)
        optimizer.zero_grad()
        loss(model, dist.get_rank(), number).backward()
        computed += local_gradient(inner, loss(inner, dist.get_rank(), number))
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)
        optimizer.step()
        optimizer.zero_grad()
    return balance(inner, start, state, computed)


class LooksAround(torch.optim.SGD):
    """Sharpness-aware minimization in one step, given the gradient here and a closure that takes it there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        before = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        super().step()


def looking_around_in_a_step() -> Balance:
    """What a step throws away, having looked around with it, is as if it had never been exchanged."""
    inner = net()
    model = wrapped(inner)
    optimizer = LooksAround(model.parameters(), RATE)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    start, computed = flat(model), torch.zeros(flat(model).numel())

    def there(number: int) -> None:
        computed.add_(local_gradient(inner, loss(inner, dist.get_rank(), number)))
        loss(model, dist.get_rank(), number).backward()

    for number in range(STEPS):
        loss(model, dist.get_rank(), number).backward()
        optimizer.step(partial(there, number))
        optimizer.zero_grad()
    return balance(inner, start, state, computed)


def scaler_of_another() -> Balance:
    """Another model's training has a scaler in use, whose scale grows; this one has none."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    inner, other = net(), net(1)
    model = wrapped(inner)
    optimizer, others = sgd(model), sgd(other)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    start, computed = flat(model), torch.zeros(flat(model).numel())
    for number in range(STEPS):
        others.zero_grad()
        scaler.scale(loss(other, dist.get_rank(), number)).backward()
        scaler.step(others)
        scaler.update()
        computed += local_gradient(inner, loss(inner, dist.get_rank(), number))
        step(model, optimizer, number)
    return balance(inner, start, state, computed)


class Lookahead(torch.optim.Optimizer):
    """Around another optimizer, without the initialisation of PyTorch's own class, as many are; it adds nothing."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


def around(wrap: Callable[[torch.optim.Optimizer], Any]) -> Tensor:
    """Six steps with an optimizer around the plain one; the parameters."""
    model = wrapped(net())
    optimizer = wrap(sgd(model, momentum=0.5))
    hvd.ddp.register(model, optimizer, Compression.sharded(**AHEAD))
    for number in range(STEPS):
        step(model, optimizer, number)
    return flat(model)


def validated() -> Tensor:
    """Six steps, before each of which the wrapper has gone into evaluation mode, and the model alone back."""
    model = wrapped(net())
    optimizer = sgd(model, momentum=0.5)
    hvd.ddp.register(model, optimizer, Compression.sharded(**AHEAD))
    for number in range(STEPS):
        model.eval()
        model.module.train()
        step(model, optimizer, number)
    return flat(model)


def wrapped_again() -> Tensor:
    """Six steps of a model that was trained before, wrapped otherwise, as by a second trainer; nothing is said."""
    inner = net()
    before = wrapped(inner)
    its = sgd(before)
    hvd.ddp.register(before, its, Compression.sharded(**AHEAD))
    for number in range(2):
        step(before, its, number)
    inner.load_state_dict(net().state_dict())
    model = wrapped(inner)
    optimizer = sgd(model, momentum=0.5)
    hvd.ddp.register(model, optimizer, Compression.sharded(**AHEAD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(STEPS):
            step(model, optimizer, number)
    return flat(model)


def averaging(optimizer: torch.optim.Optimizer) -> Any:
    return PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=2))


def saved_in_between() -> bool:
    """What is saved between backward and step is what a run that goes on from there has not sent."""
    model = wrapped(net())
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    step(model, optimizer, 0)
    before = state.memory_state_dict()
    optimizer.zero_grad()
    loss(model, dist.get_rank(), 1).backward()
    between = state.memory_state_dict()
    optimizer.step()
    same = torch.equal(before["memory"]["residual"], between["memory"]["residual"])
    return same and before["step"] == between["step"] == 1 and state.exchange.step == 2


def flushed() -> bool:
    """A flush outlives gradients that are thrown away."""
    model = wrapped(net())
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    step(model, optimizer, 0)
    state.flush()
    optimizer.zero_grad()
    loss(model, dist.get_rank(), 1).backward()
    step(model, optimizer, 2)
    return not bool(state.exchange.memory.residual.any())


def loaded(*, optimizer_first: bool) -> bool:
    """The memory is there, whichever of the two is loaded first."""
    model = wrapped(net())
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    step(model, optimizer, 0)
    memory = state.memory_state_dict()
    loads: list[Callable[[], None]] = [
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: state.load_memory_state_dict(memory),
    ]
    for load in loads if optimizer_first else reversed(loads):
        load()
    return torch.equal(state.memory_state_dict()["memory"]["residual"], memory["memory"]["residual"])


def gathered() -> list[bool]:
    """What rank 0 alone has written is enough for all; without ``gathered`` it is refused where it is not."""
    model = wrapped(net())
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    step(model, optimizer, 0)
    kept = state.exchange.memory.residual.clone()
    loaded: list[bool] = []
    for saved in (hvd.SavedMemory(state, gathered=True), hvd.SavedMemory(state)):
        written = [saved.state_dict()]
        dist.broadcast_object_list(written)
        state.exchange.reset()
        try:
            saved.load_state_dict(written[0])
        except hvd.ConfigurationError as error:
            loaded.append(dist.get_rank() > 0 and "no memory of rank 1 of 2, but of rank 0 of 2" in str(error))
        else:
            loaded.append(torch.equal(state.exchange.memory.residual, kept))
    return loaded


class Around(nn.Module):
    """As a framework puts around a model that it has wrapped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model


def registered_around() -> bool:
    """The model inside is found, unless there is more beside it."""
    model = wrapped(net())
    try:
        hvd.ddp.register(nn.Sequential(model, nn.Linear(2, 2)), sgd(model), Compression.topk(**PLAIN))
    except hvd.ConfigurationError:
        state = hvd.ddp.register(Around(model), sgd(model), Compression.topk(**PLAIN))
        step(model, sgd(model), 0)
        return state.exchange.stats.steps == 1
    return False


def warned(body: Callable[[nn.Module, torch.optim.Optimizer], None]) -> str:
    """What is said of a script that trains, but in vain."""
    model = wrapped(net())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        body(model, sgd(model))
    return " ".join(str(each.message) for each in told if "hvd_sketch: " in str(each.message))


def averaged_twice(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """By DistributedDataParallel and by the optimizer."""
    step(model, hvd.DistributedOptimizer(optimizer, model.named_parameters(), Compression.topk(**PLAIN)), 0)


def averaged_once(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """By the optimizer that `register` makes, or by one beside the model."""
    step(model, hvd.ddp.register(model, optimizer, Compression.topk(**AHEAD), error_feedback=hvd.StepAhead()), 0)
    beside = net()
    step(beside, hvd.DistributedOptimizer(sgd(beside), beside.named_parameters(), Compression.topk(**PLAIN)), 0)


def stepped_locally(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Accumulation that forgets to wait for the pass outside of ``no_sync``."""
    hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    with model.no_sync():
        step(model, optimizer, 0)


def without_a_hook(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """The state alone, which nobody hands to the model."""
    state = hvd.ddp.State(Compression.topk(**PLAIN), optimizer)
    step(model, optimizer, 0)
    assert state.exchange.stats.steps == 0


def images(layout: torch.memory_format) -> Tensor:
    """A convolution, whose gradients are anticipated, by how its values lie in memory."""
    torch.manual_seed(0)
    model = wrapped(nn.Conv2d(8, 16, 3).to(memory_format=layout))  # type: ignore[call-overload]
    optimizer = sgd(model, momentum=0.5)
    hvd.ddp.register(model, optimizer, Compression.topk(**AHEAD))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 6, 6, generator=generator).to(memory_format=layout)).square().mean().backward()
        optimizer.step()
    return flat(model)


def copied(copy_of: Callable[[Any], Any]) -> bool:
    """A copy of a model with the hook has none, until it gets one; the model's own goes on."""
    model = wrapped(net())
    optimizer = sgd(model)
    hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
    step(model, optimizer, 0)
    ends = []
    for each in (copy_of(model), model):
        its = optimizer if each is model else sgd(each)
        if each is not model:
            hvd.ddp.register(each, its, Compression.topk(**{**PLAIN, "ratio": 1.0}))
        step(each, its, 1)
        ends.append(flat(each))
    return not torch.equal(*ends)


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def balances() -> Iterable[Balance]:
    """Of all scripts that have one."""
    yield two_optimizers()
    yield two_models()
    yield thrown_away(lambda model: model.zero_grad(set_to_none=True))
    yield thrown_away(lambda model: model.zero_grad(set_to_none=False))
    yield another_optimizer()
    yield looking_around()
    yield looking_around_in_a_step()
    yield scaler_of_another()


def seen() -> dict[str, Any]:
    """What came of all of them."""
    return {
        "balances": list(balances()),
        "another": anticipating_for_another(),
        "around": [around(Lookahead), around(averaging), validated(), wrapped_again()],
        "true": {
            "saved in between": saved_in_between(),
            "flushed": flushed(),
            "loaded": [loaded(optimizer_first=False), loaded(optimizer_first=True)],
            "gathered": gathered(),
            "registered around": registered_around(),
            "copied": [copied(copy.deepcopy), copied(through_a_file)],
        },
        "warned": [warned(averaged_twice), warned(averaged_once), warned(stepped_locally), warned(without_a_hook)],
        "images": [images(torch.contiguous_format), images(torch.channels_last)],
    }
