"""The compressors under *stock* Horovod: the same training as our own optimizer, whatever Horovod does around them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

import hvd_sketch
from hvd_sketch import Compression, ConfigurationError, RankMismatchError
from hvd_sketch.compressors import Sparsifier
from tests.support.ranks import ranks
from tests.support.training import COMPRESSED, flat, loss, net, train

pytestmark = pytest.mark.early

SKETCH: dict[str, Any] = {"ratio": 10.0, "warmup_steps": 2}
EVERYTHING = Compression.sketch(cols=COMPRESSED, k=COMPRESSED, half=False, clip_norm=None)
Wrap = Callable[..., Any]
"""Makes a distributed optimizer of (optimizer, model, **Horovod's keywords)."""


def stock(optimizer: torch.optim.Optimizer, model: nn.Module, make: Any = Compression.sketch, **keywords: Any) -> Any:
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=make(**SKETCH), **keywords)


def own(optimizer: torch.optim.Optimizer, model: nn.Module, make: Any = Compression.sketch, **keywords: Any) -> Any:
    return hvd_sketch.DistributedOptimizer(optimizer, model.named_parameters(), make(**SKETCH), **keywords)


def plain(wrap: Wrap, rank: int) -> Tensor:
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)
    return train(optimizer, model, 6, rank)


def topk(wrap: Wrap, rank: int) -> Tensor:
    model = net()
    return train(wrap(torch.optim.SGD(model.parameters(), 0.1), model, Compression.topk), model, 6, rank)


def automatic(wrap: Wrap, rank: int) -> Tensor:
    model = net()
    return train(wrap(torch.optim.SGD(model.parameters(), 0.1), model, Compression.auto), model, 6, rank)


def summed(wrap: Wrap, rank: int) -> Tensor:
    model = net()
    return train(wrap(torch.optim.SGD(model.parameters(), 0.05), model, op=hvd.Sum), model, 5, rank)


def predivided(wrap: Wrap, rank: int) -> Tensor:
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model, gradient_predivide_factor=2.0)
    return train(optimizer, model, 4, rank)


def hooks_in_another_order_on_each_rank(wrap: Wrap, rank: int) -> Tensor:
    """Control flow by rank: hooks fire in opposite order, and the middle layer's on one rank only, if at all."""
    layers = nn.ModuleList([net(seed) for seed in range(3)])
    optimizer = wrap(torch.optim.SGD(layers.parameters(), 0.1), layers)
    for step in range(6):
        optimizer.zero_grad()
        for number in [0, 2] if rank == 0 else [2, 0]:
            loss(layers[number], rank, step).backward()
        if step % 3 == rank:
            loss(layers[1], rank, step).backward()
        optimizer.step()
    return flat(layers)


def groups_by_number(wrap: Wrap, rank: int) -> Tensor:
    model = net()
    return train(wrap(torch.optim.SGD(model.parameters(), 0.1), model, groups=2), model, 5, rank)


def groups_by_list(wrap: Wrap, rank: int) -> Tensor:
    """One group of two layers, the others alone; in one step no rank has the gradients of that group."""
    model = net()
    groups = [[model[0].weight, model[2].bias]]
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model, groups=groups)
    train(optimizer, model, 3, rank)
    optimizer.zero_grad()
    model[2](torch.ones(2, 60) * rank).square().mean().backward()
    optimizer.step()
    return train(optimizer, model, range(3, 5), rank)


def two_backward_passes_and_an_early_step(wrap: Wrap, rank: int) -> Tensor:
    """The last batch of an epoch may come alone, and on one rank only."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model, backward_passes_per_step=2)
    for step in range(5):
        optimizer.zero_grad()
        for part in range(1 if step == 3 or (step == 4 and rank == 1) else 2):
            loss(model, rank, 2 * step + part).backward()
        optimizer.step()
    return flat(model)


def gradients_kept_as_zeros(wrap: Wrap, rank: int) -> Tensor:
    return _cleared(wrap, rank, set_to_none=False)


def gradients_freed(wrap: Wrap, rank: int) -> Tensor:
    return _cleared(wrap, rank, set_to_none=True)


def _cleared(wrap: Wrap, rank: int, *, set_to_none: bool) -> Tensor:
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    for step in range(5):
        model.zero_grad(set_to_none=set_to_none)
        loss(model, rank, step).backward()
        optimizer.step()
    return flat(model)


def channels_last(wrap: Wrap, rank: int) -> Tensor:
    model = nn.Conv2d(16, 32, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(model.weight.numel()).view_as(model.weight).sin() / 10)
        assert model.bias is not None
        model.bias.zero_()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    for step in range(4):
        optimizer.zero_grad()
        inputs = (torch.arange(2 * 16 * 8 * 8.0).view(2, 16, 8, 8) * (1 + rank + step)).sin()
        model(inputs.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        assert model.weight.grad is not None
        assert model.weight.grad.stride() == model.weight.stride() != model.weight.contiguous().stride()
    return flat(model)


def frozen_after_wrapping_and_trained_later(wrap: Wrap, rank: int) -> Tensor:
    """Horovod hooks what trains when it wraps; what is frozen from the first step to the fourth is left alone."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01), model)
    before = flat(model[0])
    model[0].requires_grad_(False)
    train(optimizer, model, 4, rank)
    assert torch.equal(flat(model[0]), before)
    model[0].requires_grad_(True)
    train(optimizer, model, range(4, 8), rank)
    assert not torch.equal(flat(model[0]), before)
    return flat(model)


def without_a_first_batch(wrap: Wrap, rank: int) -> Tensor:
    """On rank 1, of either optimizer; and once more later. Both have a compressor of their own."""
    models = [net(1), net(2)]
    optimizers = []
    for number, model in enumerate(models):
        named = nn.ModuleDict({f"model {number}": model})
        optimizers.append(wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), named))
    for step in range(5):
        for optimizer, model in zip(optimizers, models, strict=True):
            optimizer.zero_grad()
            if not (rank == 1 and step in (0, 3)):
                loss(model, rank, step).backward()
        for optimizer in reversed(optimizers):
            optimizer.step()
    return torch.cat([flat(model) for model in models])


def a_compiled_training_step(wrap: Wrap, rank: int) -> Tensor:
    """All of it, and ``optimizer.step`` alone; one rank has no gradient of a layer now and then."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)

    @torch.compile(backend="eager")
    def whole(step: int) -> None:
        optimizer.zero_grad()
        loss(model, rank, step).backward()
        optimizer.step()

    step_alone = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(6):
        if step % 2:
            whole(step)
            continue
        optimizer.zero_grad()
        value = model[2](torch.ones(2, 60)).square().mean() if step == 4 and rank == 1 else loss(model, rank, step)
        value.backward()
        step_alone()
    return flat(model)


def resumed_by_rank_0_and_broadcast(wrap: Wrap, rank: int) -> Tensor:
    """As in Horovod's examples; a rank without a state makes one by a step, which must not decay its weights."""
    model = net(rank)
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1), model)
    if rank == 0:
        saved = net(5)
        inner = torch.optim.SGD(saved.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        train(inner, saved, 3)
        model.load_state_dict(saved.state_dict())
        optimizer.load_state_dict(inner.state_dict())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    return train(optimizer, model, range(3, 6), rank)


def synchronized_by_hand_and_clipped(wrap: Wrap, rank: int) -> Tensor:
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    for step in range(4):
        optimizer.zero_grad()
        loss(model, rank, step).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with optimizer.skip_synchronize():
            optimizer.step()
    return flat(model)


def synchronized_twice(wrap: Wrap, rank: int) -> Tensor:
    """The fifteen, item 5: Horovod warns and compresses again what is already the update of all ranks."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    return train(optimizer, model, 5, rank, after_backward=lambda step: optimizer.synchronize())


def two_models_before_either_steps(wrap: Wrap, rank: int) -> Tensor:
    """One compressor object, two optimizers, and the models' hooks in another order on each rank."""
    models = {"generator": net(1), "critic": net(2)}
    optimizers = []
    compressor = Compression.sketch(**SKETCH)
    for name, model in models.items():
        prefixed = nn.ModuleDict({name: model})
        inner = torch.optim.SGD(model.parameters(), 0.1)
        optimizers.append(wrap(inner, prefixed, lambda **settings: compressor))
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name in sorted(models, reverse=bool(rank)):
            loss(models[name], rank, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    return torch.cat([flat(model) for model in models.values()])


def one_model_after_another_with_equal_names(wrap: Wrap, rank: int) -> Tensor:
    """Equal parameter names, one compressor, and a garbage collection between the two on one rank only."""
    models = [net(1), net(2)]
    compressor = Compression.sketch(**SKETCH)
    optimizers = []
    for number, model in enumerate(models):
        optimizers.append(wrap(torch.optim.SGD(model.parameters(), 0.1), model, lambda **settings: compressor))
        if number == rank == 0:
            import gc

            gc.collect()
    for step in range(4):
        for optimizer, model in zip(optimizers, models, strict=True):
            train(optimizer, model, range(step, step + 1), rank)
    return torch.cat([flat(model) for model in models])


def cloudpickled_compressor(wrap: Wrap, rank: int) -> Tensor:
    original = Compression.sketch(schedule=lambda step: 1.0 if step < 2 else 10.0)
    model = net()
    pickled = cloudpickle.loads(cloudpickle.dumps(original))
    return train(wrap(torch.optim.SGD(model.parameters(), 0.1), model, lambda **settings: pickled), model, 5, rank)


def changed_before_the_step(wrap: Wrap, rank: int) -> Tensor:
    """Clipped, scaled, replaced; set to None on one rank, and on all of them."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01), model)
    weight: Any = model[2].weight

    def change(step: int) -> None:
        if step == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        elif step == 1:
            weight.grad.mul_(0.5)
        elif step == 2:
            weight.grad = torch.full_like(weight, 0.01 * (rank + 1))
        elif step == 4 or rank == 1:
            weight.grad = None

    train(optimizer, model, 4, rank, change)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(optimizer, model, range(4, 5), rank, change)
    stood = [torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True)]
    assert stood == [parameter is weight for parameter in model.parameters()]
    return train(optimizer, model, range(5, 7), rank)


def changed_before_synchronizing_by_hand(wrap: Wrap, rank: int) -> Tensor:
    """Set to None on rank 1, then on both ranks."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01), model)
    for step in range(5):
        optimizer.zero_grad()
        loss(model, rank, step).backward()
        if step == 3 or (step == 1 and rank == 1):
            model[2].weight.grad = None
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with optimizer.skip_synchronize():
            optimizer.step()
    return flat(model)


def thrown_away(wrap: Wrap, rank: int) -> Tensor:
    """Synchronized, and cleared: as if it had never been."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    reference = net()
    expected = wrap(torch.optim.SGD(reference.parameters(), 0.1), reference)
    for step in range(5):
        for batch in (50 + step, step):
            optimizer.zero_grad()
            loss(model, rank, batch).backward()
            optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    assert torch.equal(flat(model), train(expected, reference, 5, rank))
    return flat(model)


def void_steps(wrap: Wrap, rank: int) -> Tensor:
    """Not a number on rank 1: as if it had never been, weight decay and momentum included."""
    ends = []
    for spoilt in (True, False):
        model = net()
        inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        optimizer = wrap(inner, model)
        for step in range(5):
            for bad in (True, False) if spoilt and step in (0, 3) else (False,):
                optimizer.zero_grad()
                value = loss(model, rank, step)
                (value * float("nan") if bad and rank == 1 else value).backward()
                optimizer.step()
        ends.append(flat(model))
    assert torch.equal(*ends)
    return ends[0]


def scaled_in_horovods_order(wrap: Wrap, rank: int) -> Tensor:
    """With an overflow on rank 1, which halves the scale on both."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(5):
        optimizer.zero_grad()
        value = scaler.scale(loss(model, rank, step))
        (value * float("inf") if (step, rank) == (2, 1) else value).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    return torch.cat([flat(model), torch.tensor([scaler.get_scale() / 2.0**15])])


def beside_the_scaler_of_another(wrap: Wrap, rank: int) -> Tensor:
    """Whose scale changes with every step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(torch.ones(()))
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    for step in range(5):
        train(optimizer, model, range(step, step + 1), rank)
        scaler.update(2.0 ** (4 + 3 * step))
    return flat(model)


SCENARIOS: list[Callable[[Wrap, int], Tensor]] = [
    plain,
    topk,
    automatic,
    summed,
    predivided,
    hooks_in_another_order_on_each_rank,
    groups_by_number,
    groups_by_list,
    two_backward_passes_and_an_early_step,
    gradients_kept_as_zeros,
    gradients_freed,
    channels_last,
    frozen_after_wrapping_and_trained_later,
    without_a_first_batch,
    a_compiled_training_step,
    resumed_by_rank_0_and_broadcast,
    synchronized_by_hand_and_clipped,
    synchronized_twice,
    two_models_before_either_steps,
    one_model_after_another_with_equal_names,
    cloudpickled_compressor,
    changed_before_the_step,
    changed_before_synchronizing_by_hand,
    thrown_away,
    void_steps,
    scaled_in_horovods_order,
    beside_the_scaler_of_another,
]


def run_scenarios(scenarios: list[Callable[[Wrap, int], Tensor]]) -> list[tuple[Tensor, Tensor]]:
    hvd.init()
    return [(scenario(stock, hvd.rank()), scenario(own, hvd.rank())) for scenario in scenarios]


@pytest.fixture(scope="module")
def outcomes() -> list[list[tuple[Tensor, Tensor]]]:
    """Of every scenario, on two ranks: the parameters under stock Horovod and under our optimizer."""
    return ranks(2, run_scenarios, SCENARIOS, timeout=200)


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=[scenario.__name__ for scenario in SCENARIOS])
def test_stock_horovod_and_our_optimizer_train_alike(outcomes: list[list[tuple[Tensor, Tensor]]], number: int) -> None:
    """The fifteen, items 1, 2 and 5: nothing hangs, Horovod is as installed, and every bit is equal."""
    (stock_0, own_0), (stock_1, own_1) = (outcome[number] for outcome in outcomes)
    assert torch.equal(stock_0, stock_1)
    assert torch.equal(own_0, own_1)
    assert torch.equal(stock_0, own_0)
    assert stock_0.isfinite().all()


def test_four_ranks_with_hooks_in_different_orders_train_alike() -> None:
    """The fifteen, item 1."""
    outcomes = ranks(4, run_scenarios, [hooks_in_another_order_on_each_rank, two_models_before_either_steps])
    for number in range(2):
        first = outcomes[0][number][0]
        assert all(torch.equal(end, first) for outcome in outcomes for end in outcome[number])


def step_with_sparse_gradients(compression: Any) -> Tensor:
    model = nn.ModuleDict({"words": nn.Embedding(40, 20, sparse=True), "net": net()})
    words = model["words"]
    assert isinstance(words, nn.Embedding)
    nn.init.ones_(words.weight)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), compression=compression
    )
    for step in range(4):
        optimizer.zero_grad()
        (words(torch.tensor([step, hvd.rank(), 7])).square().mean() + loss(model["net"], 0, step)).backward()
        optimizer.step()
    return flat(words)


def uneven_epochs(make: Callable[[], Any], counts: tuple[int, int], epochs: int, *, use_stock: bool) -> Tensor:
    """Rank r has counts[r] batches in every epoch; the one that is done joins, and takes over the parameters.

    With Horovod's own join by hand, with ours by itself. Another collective goes on beside the steps.
    """
    model = net()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    module: Any = hvd if use_stock else hvd_sketch
    optimizer = module.DistributedOptimizer(inner, model.named_parameters(), compression=make())
    for epoch in range(epochs):
        for step in range(10 * epoch, 10 * epoch + counts[hvd.rank()]):
            train(optimizer, model, range(step, step + 1), hvd.rank())
            hvd.allreduce(torch.ones(2), name="metric")
        last = module.join()
        if use_stock:
            hvd.broadcast_parameters(model.state_dict(), root_rank=int(last))
            hvd.broadcast_optimizer_state(optimizer, root_rank=int(last))
    return flat(model)


class Outcome:
    """What the tests below read of one launch."""

    def __init__(self) -> None:
        sketch = Compression.sketch(**SKETCH)
        self.sparse = step_with_sparse_gradients(sketch), step_with_sparse_gradients(hvd.Compression.none)
        self.joined_as_dense = (
            uneven_epochs(lambda: EVERYTHING, (3, 5), 1, use_stock=True),
            uneven_epochs(lambda: hvd.Compression.none, (3, 5), 1, use_stock=True),
        )
        self.joined = [
            [
                uneven_epochs(partial(make, ratio=10.0, warmup_steps=6), (2, 4), 3, use_stock=use)
                for use in (True, False)
            ]
            for make in (Compression.sketch, Compression.topk, Compression.auto)
        ]
        self.never_stepped = uneven_epochs(lambda: Compression.auto(ratio=10.0), (0, 2), 2, use_stock=False)


def other_outcomes() -> Outcome:
    hvd.init()
    return Outcome()


@pytest.fixture(scope="module")
def others() -> list[Outcome]:
    return ranks(2, other_outcomes, timeout=150)


def test_sparse_gradients_are_left_to_horovod(others: list[Outcome]) -> None:
    for outcome in others:
        assert torch.equal(*outcome.sparse)


def test_a_rank_that_joined_counts_as_gradient_zero(others: list[Outcome]) -> None:
    """Sending everything, the epoch equals the one without compression."""
    for outcome in others:
        torch.testing.assert_close(*outcome.joined_as_dense, rtol=1e-5, atol=1e-6)


def test_training_goes_on_after_a_join(others: list[Outcome]) -> None:
    """The rank that joined did not count the others' steps: hashes, sizes and scales must fit again all the same."""
    for ends, others_ends in zip(others[0].joined, others[1].joined, strict=True):
        assert all(torch.equal(end, ends[0]) for end in (*ends, *others_ends))
        assert ends[0].isfinite().all()
    assert torch.equal(others[0].never_stepped, others[1].never_stepped)


def process_set_of_two() -> tuple[Tensor, ...]:
    """Ranks 0 and 2 train together, rank 1 alone; then all of them with equal parameter names."""
    pair = hvd.ProcessSet([0, 2])
    hvd.init(process_sets=[pair])
    ends = []
    for wrap in (stock, own):
        for process_set in (pair, hvd.global_process_set):
            model = net()
            optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model, process_set=process_set)
            ends.append(train(optimizer, model, 4, hvd.rank()))
    return tuple(ends)


def dynamic_process_set() -> Tensor:
    hvd.init()
    pair = hvd.add_process_set(hvd.ProcessSet([0, 2]))
    model = net()
    if pair.included():
        train(own(torch.optim.SGD(model.parameters(), 0.1), model, process_set=pair), model, 4, hvd.rank())
    everybody = own(torch.optim.SGD(model.parameters(), 0.1), model)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return train(everybody, model, 2, hvd.rank())


def test_a_process_set_trains_by_itself() -> None:
    model = net()
    alone = train(torch.optim.SGD(model.parameters(), 0.1), model, 4, rank=1)
    results = ranks(3, process_set_of_two)
    for set_stock, all_stock, set_own, all_own in results:
        assert torch.equal(set_stock, set_own)
        assert torch.equal(all_stock, all_own)
        assert torch.equal(all_stock, results[0][1])
    assert torch.equal(results[0][0], results[2][0])
    torch.testing.assert_close(results[1][0], alone)
    assert not torch.equal(results[0][0], alone)


def test_a_process_set_that_only_its_ranks_train_with_disturbs_no_other() -> None:
    first, *rest = ranks(3, dynamic_process_set, env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert all(torch.equal(end, first) for end in rest)


def refusals() -> dict[str, str]:
    """What each misuse tells, and that the ranks still understand each other afterwards."""
    hvd.init()
    told = {}

    def expect(name: str, misuse: Callable[[], Any]) -> None:
        try:
            misuse()
        except (ConfigurationError, RankMismatchError) as error:
            told[name] = str(error)
        hvd.allreduce(torch.zeros(1), name=f"after {name}")

    sketch = Compression.sketch(**SKETCH)
    expect("allreduce", lambda: hvd.allreduce(torch.ones(3), name="a", compression=sketch))
    model = net()
    optimizer = stock(torch.optim.SGD(model.parameters(), 0.1), model, lambda **settings: sketch)
    train(optimizer, model, 2, hvd.rank())
    steps = hvd_sketch.exchange_of(sketch).stats.steps
    expect("allreduce later", lambda: hvd.allreduce(torch.ones(3), name="b", compression=sketch))
    expect("reducescatter", lambda: hvd.reducescatter(torch.ones(4, 4), name="c", compression=sketch))
    expect("parameter", lambda: hvd.allreduce(nn.Parameter(torch.ones(3)), name="d", compression=sketch))
    other = net(seed=hvd.rank())
    apart = stock(torch.optim.SGD(other.parameters(), 0.1), other)
    loss(other, 0, 0).backward()
    expect("values", apart.synchronize)
    train(optimizer, model, range(2, 4), hvd.rank())
    assert (steps, hvd_sketch.exchange_of(sketch).stats.steps) == (2, 4)

    for name, keywords in {
        "op": {"op": hvd.Min},
        "adasum": {"op": hvd.Adasum},
        "sparse_as_dense": {"sparse_as_dense": True},
        "momentum": {"make": lambda **settings: Compression.sketch(momentum=hvd_sketch.Momentum(0.9), **settings)},
    }.items():
        fresh = net()
        optimizer = stock(torch.optim.SGD(fresh.parameters(), 0.1, momentum=0.9), fresh, **keywords)
        expect(name, partial(torch.autograd.backward, [loss(fresh, hvd.rank(), 0)]))
    group = {"params": [nn.Parameter(torch.ones(2, 2))]}
    changes: dict[str, Callable[[Any, Any], object]] = {
        "frozen": lambda model, _: model[0].weight.requires_grad_(hvd.rank() == 0),
        "unfrozen": lambda model, _: model[2].bias.requires_grad_(hvd.rank() == 0),
        "added": lambda _, optimizer: optimizer.add_param_group(group) if hvd.rank() else None,
    }
    for name, change in changes.items():
        fresh = net()
        fresh[2].bias.requires_grad_(False)
        compressor = Compression.sketch(**SKETCH)
        optimizer = stock(torch.optim.SGD(fresh.parameters(), 0.1), fresh, lambda c=compressor, **settings: c)
        train(optimizer, fresh, 3, hvd.rank())
        change(fresh, optimizer)
        kept = hvd_sketch.exchange_of(compressor).memory.residual.clone()
        loss(fresh, hvd.rank(), 3).backward()
        expect(name, optimizer.synchronize)
        assert torch.equal(hvd_sketch.exchange_of(compressor).memory.residual, kept), (name, told[name])
    return told


def test_misuse_is_refused_alike_on_all_ranks() -> None:
    """The fifteen, item 15: also what cannot be known before the first step, which is then not taken."""
    told, other = ranks(2, refusals)
    assert told == other
    for name, expected in {
        "allreduce": "only inside horovod.torch.DistributedOptimizer.*Compression.none or fp16",
        "allreduce later": "no parameter's gradient.*Compression.none or fp16",
        "reducescatter": "no parameter's gradient.*Compression.none or fp16",
        "parameter": "Compression.none or fp16",
        "values": r"values: rank 0 has .*0\.weight=.*broadcast_parameters.*the first step",
        "op": "only Average and Sum are linear",
        "adasum": "op=Adasum.*use op=Average",
        "sparse_as_dense": "sparse_as_dense=True hides.*use hvd_sketch.DistributedOptimizer",
        "momentum": "momentum is applied before the exchange.*parameter group 0.*without momentum",
        "frozen": r"parameter '0\.weight' is frozen .* on 1 of the 2 ranks; freeze it on all ranks or on none",
        "unfrozen": r"rank 0: parameter '2\.bias' was added or unfrozen.*wrap the plain optimizer again",
        "added": "rank 1: a parameter was added",
    }.items():
        assert re.search(expected, told[name], re.DOTALL), (name, told[name])


def test_the_exchange_is_there_from_the_first_step_on() -> None:
    with pytest.raises(ConfigurationError, match="from the first step on"):
        hvd_sketch.exchange_of(Compression.sketch())


@pytest.mark.parametrize("kind", ["none", "fp16"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64]
)
def test_none_and_fp16_are_horovods_own(kind: str, dtype: torch.dtype) -> None:
    tensor = torch.arange(-300, 300).to(dtype) * 241 if dtype.is_floating_point else torch.arange(-300, 300).to(dtype)
    ours, theirs = getattr(Compression, kind), getattr(hvd.Compression, kind)
    sent, context = ours.compress(tensor)
    expected, expected_context = theirs.compress(tensor)
    assert sent.dtype == expected.dtype
    assert torch.equal(sent, expected)
    back, expected_back = ours.decompress(sent, context), theirs.decompress(expected, expected_context)
    assert back.dtype == expected_back.dtype == dtype
    assert torch.equal(back, expected_back)


@pytest.mark.parametrize(
    "compressor",
    [
        Compression.sketch(ratio=7.0, seed=3, exclude=("*.head",), momentum=hvd_sketch.Momentum(0.8)),
        Compression.topk(ratio=7.0, clip_norm=None),
    ],
)
def test_compressors_survive_cloudpickle(compressor: Sparsifier) -> None:
    assert vars(cloudpickle.loads(cloudpickle.dumps(compressor))) == vars(compressor)
    assert cloudpickle.loads(cloudpickle.dumps(Compression.fp16)) is Compression.fp16
