"""`DistributedOptimizer` on real ranks: broadcasts, checkpoints, gradient scaling, models that share names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch import Compression, ConfigurationError
from tests.support import methods
from tests.support.broadcasting import broadcast_odd_types
from tests.support.methods import METHODS
from tests.support.ranks import ranks
from tests.support.training import flat, loss, net, train

SETTINGS: dict[str, Any] = {"ratio": 10.0, "warmup_steps": 4}
STEPS, SAVED_AFTER = 10, 5
KINDS = ("sketch", "momentum correction", "topk", "adam")
ON_HOROVOD = {name: method for name, method in METHODS.items() if name not in ("dmsgd", "decentlam", "lead")}


def make(kind: str, model: nn.Module, **keywords: Any) -> Any:
    compression: Any = Compression.topk(**SETTINGS) if kind == "topk" else Compression.sketch(**SETTINGS)
    if kind == "adam":
        inner: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 0.01)
    else:
        inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    correction = kind == "momentum correction"
    return hvd.DistributedOptimizer(
        inner, model.named_parameters(), compression, momentum_correction=correction, **keywords
    )


def save_on_the_way(folder: Path) -> list[Tensor]:
    """Train to the end; on the way every rank saves, and rank 0 once more after a flush that it alone asked for."""
    hvd.init()
    ends = []
    for kind in KINDS:
        model = net()
        optimizer = make(kind, model)
        train(optimizer, model, SAVED_AFTER, hvd.rank())
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "memory": optimizer.memory_state_dict(),
        }
        torch.save(state, folder / f"{kind}.{hvd.rank()}.pt")
        ends.append(train(optimizer, model, range(SAVED_AFTER, STEPS), hvd.rank()))
        if hvd.rank() == 0:
            optimizer.flush()
        train(optimizer, model, range(STEPS, STEPS + 1), hvd.rank())
        assert not optimizer.exchange.memory.residual.any()
        if hvd.rank() == 0:
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{kind}.flushed.pt"
            )
    return ends


def resume(folder: Path) -> list[Tensor]:
    hvd.init()
    ends = []
    for kind in KINDS:
        saved = torch.load(folder / f"{kind}.{hvd.rank()}.pt", weights_only=True)
        model = net(seed=9)
        model.load_state_dict(saved["model"])
        optimizer = make(kind, model)
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.load_memory_state_dict(saved["memory"])
        ends.append(train(optimizer, model, range(SAVED_AFTER, STEPS), hvd.rank()))
    return ends


def resume_with_more_ranks(folder: Path) -> list[Tensor]:
    """Rank 0 loads and broadcasts; a memory of the old ranks does not fit."""
    hvd.init()
    ends = []
    for kind in KINDS:
        model = net(seed=hvd.rank())
        optimizer = make(kind, model)
        if hvd.rank() == 0:
            saved = torch.load(folder / f"{kind}.flushed.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        memory = torch.load(folder / f"{kind}.{hvd.rank() % 2}.pt", weights_only=True)["memory"]
        with pytest.raises(
            ConfigurationError,
            match=rf"rank {hvd.rank()}: the saved memory does not fit.*size is 2, here 3.*flush\(\)",
        ):
            optimizer.load_memory_state_dict(memory)
        ends.append(train(optimizer, model, range(STEPS + 1, STEPS + 5), hvd.rank()))
    return ends


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The fifteen, item 7: to the bit on the same ranks, and after a flush from rank 0's file on another number."""
    expected = ranks(2, save_on_the_way, tmp_path)
    resumed = ranks(2, resume, tmp_path)
    for number, kind in enumerate(KINDS):
        assert torch.equal(expected[0][number], expected[1][number]), kind
        assert all(torch.equal(ends[number], expected[0][number]) for ends in resumed), kind
    first, *others = ranks(3, resume_with_more_ranks, tmp_path)
    for number, kind in enumerate(KINDS):
        assert all(torch.equal(ends[number], first[number]) for ends in others), kind
        assert first[number].isfinite().all()


class Broadcast(NamedTuple):
    """What a rank has after the broadcasts, and after some training."""

    state: list[Tensor]
    parameters: Tensor
    steps_before: int
    end: Tensor


def broadcast(kind: str, *, restored: bool) -> Broadcast:
    model = net(seed=hvd.rank())
    optimizer = make(kind, model)
    if restored and hvd.rank() == 0:
        elsewhere = net(seed=5)
        inner = torch.optim.Adam(elsewhere.parameters(), 0.02)
        if kind != "adam":
            inner = torch.optim.SGD(elsewhere.parameters(), 0.2, momentum=0.9)  # type: ignore[assignment]
        train(inner, elsewhere, 3)
        model.load_state_dict(elsewhere.state_dict())
        optimizer.load_state_dict(inner.state_dict())
    if restored:  # in the order of Horovod's examples
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    else:
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    assert not optimizer.exchange.memory.residual.any()
    entries = list(optimizer.state_dict()["state"].values())
    state = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    state.append(torch.tensor(optimizer.param_groups[0]["lr"]))
    parameters, steps = flat(model), optimizer.exchange.stats.steps
    return Broadcast(state, parameters, steps, train(optimizer, model, 5, hvd.rank()))


def broadcasts() -> dict[str, Broadcast]:
    hvd.init()
    return {f"{kind} {restored}": broadcast(kind, restored=restored) for kind in KINDS for restored in (False, True)}


def scaled_with_an_overflow_on_rank_1() -> tuple[list[Tensor], float, Tensor]:
    """The documented pattern of mixed precision; the parameters after every step, the scale, and the memory's size."""
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = make("sketch", model, grad_scaler=scaler)
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        scaled = scaler.scale(loss(model, hvd.rank(), step))
        (scaled * float("inf") if (step, hvd.rank()) == (3, 1) else scaled).backward()
        kept = optimizer.exchange.memory.residual.clone()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(optimizer.exchange.memory.residual, kept) is (step in (0, 3))
        seen.append(flat(model))
    return seen, scaler.get_scale(), torch.tensor(optimizer.exchange.stats.skipped)


def two_models_with_equal_names(same: bool) -> Tensor:
    """Both backward passes come before either step, in another order on each rank."""
    models = [net(1), net(2)]
    optimizers: list[Any] = [
        hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1),
            [(name if same else f"{number}.{name}", p) for name, p in model.named_parameters()],
            Compression.sketch(**SETTINGS),
        )
        for number, model in enumerate(models)
    ]
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for model in models if hvd.rank() else reversed(models):
            loss(model, hvd.rank(), step).backward()
        for optimizer in optimizers:
            optimizer.step()
    return torch.cat([flat(model) for model in models])


def broadcast_of(method: Any) -> tuple[Tensor, Tensor]:
    """State and rates after rank 0 alone has loaded what a plain optimizer had, and the model after some training."""
    model = net(seed=hvd.rank())
    everybody: Any = None
    optimizer = method.make(method.optimizer(model.parameters()), model, everybody)
    if hvd.rank() == 0:
        elsewhere = net(seed=5)
        inner = method.optimizer(elsewhere.parameters())
        train(inner, elsewhere, 3)
        if inner.state:  # Horovod sends no rates of an optimizer without one
            inner.param_groups[0]["lr"] *= 0.5
        model.load_state_dict(elsewhere.state_dict())
        optimizer.load_state_dict(inner.state_dict())
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    entries = list(optimizer.state_dict()["state"].values())
    values = [value.reshape(-1) for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    state = torch.cat([torch.tensor([optimizer.param_groups[0]["lr"]]), *values])
    methods.train(optimizer, model, hvd.rank(), range(4))
    return state, methods.shared(optimizer, model)


class Outcome(NamedTuple):
    """What one launch leaves for the tests below."""

    methods: dict[str, tuple[Tensor, Tensor]]
    broadcasts: dict[str, Broadcast]
    scaled: tuple[list[Tensor], float, Tensor]
    same_names: Tensor
    other_names: Tensor
    odd_types: list[list[Tensor]]


def outcome() -> Outcome:
    hvd.init()
    return Outcome(
        {name: broadcast_of(method) for name, method in ON_HOROVOD.items()},
        broadcasts(),
        scaled_with_an_overflow_on_rank_1(),
        two_models_with_equal_names(same=True),
        two_models_with_equal_names(same=False),
        broadcast_odd_types(hvd),
    )


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return ranks(2, outcome)


@pytest.mark.parametrize("name", ON_HOROVOD)
def test_every_method_takes_part_in_broadcasts_after_rank_0_alone_has_loaded(
    outcomes: list[Outcome], name: str
) -> None:
    """No step communicates on the way, and all ranks train one model then."""
    (state, end), (other_state, other_end) = (outcome.methods[name] for outcome in outcomes)
    assert torch.equal(state, other_state)
    assert torch.equal(end, other_end)
    assert end.isfinite().all()


def test_what_horovod_does_not_send_is_broadcast_by_us(outcomes: list[Outcome]) -> None:
    first, second = (outcome.odd_types for outcome in outcomes)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_broadcasts_make_all_ranks_equal(outcomes: list[Outcome], kind: str, restored: bool) -> None:
    """The fifteen, item 8: also when rank 0 alone was restored, and without any exchange on the way."""
    first, second = (outcome.broadcasts[f"{kind} {restored}"] for outcome in outcomes)
    assert len(first.state) > 1
    assert all(torch.equal(a, b) for a, b in zip(first.state, second.state, strict=True))
    assert torch.equal(first.parameters, second.parameters)
    assert first.steps_before == second.steps_before == 0
    assert torch.equal(first.end, second.end)
    assert not torch.equal(first.end, first.parameters)
    if restored:
        assert first.state[-1] == pytest.approx(0.02 if kind == "adam" else 0.2)


def test_an_overflow_on_one_rank_skips_the_step_on_all(outcomes: list[Outcome]) -> None:
    """The fifteen, item 6."""
    (first, scale, skipped), (second, other_scale, _) = (outcome.scaled for outcome in outcomes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first[3], first[4])
    assert scale == other_scale == 2.0**11
    assert int(skipped) == 1


def test_models_with_equal_names_do_not_mix(outcomes: list[Outcome]) -> None:
    """The fifteen, item 5."""
    for outcome in outcomes:
        assert torch.equal(outcome.same_names, outcome.other_names)
        assert torch.equal(outcome.same_names, outcomes[0].same_names)


def alone() -> list[tuple[Tensor, Tensor]]:
    """Training on the only rank, with our optimizer and with the plain one."""
    hvd.init()
    ends = []
    for kind in KINDS:
        model, plain = net(), net()
        optimizer = make(kind, model)
        inner = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        reference = torch.optim.Adam(plain.parameters(), 0.01) if kind == "adam" else inner
        ends.append((train(optimizer, model, 6), train(reference, plain, 6)))
        assert optimizer.exchange.stats.steps == 0
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    return ends


def test_the_only_rank_trains_as_if_never_wrapped() -> None:
    for wrapped, plain in ranks(1, alone)[0]:
        assert torch.equal(wrapped, plain)
