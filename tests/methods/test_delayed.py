"""Gradients one step late: their laws, what is refused, and that a step waits for nobody."""

from __future__ import annotations

import copy
import gc
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch
from hvd_sketch import Anticipate, Compression, ConfigurationError, DistributedOptimizer, FactoredMoments, StepAhead
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup, run_in_process
from hvd_sketch.errors import RankLostError
from hvd_sketch.exchange import scaling
from hvd_sketch.instances import instances_of
from tests.support.compressors import SHARDED, TOPK, WHOLE, at_ratio_one
from tests.support.simulation import lost, rounding
from tests.support.training import flat, loss, net

STEPS = 6
SERVED = {name: member for name, member in WHOLE.items() if "buckets" not in name}
EVERYTHING: dict[str, Any] = {"none": Compression.none, "topk": at_ratio_one(TOPK), "sharded": at_ratio_one(SHARDED)}
INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}
Gradients = Sequence[Tensor | None]


def wrap(model: nn.Module, comm: Any, compression: Any = SHARDED, inner: Any = None, **options: Any) -> Any:
    own = torch.optim.SGD(model.parameters(), 1.0) if inner is None else inner(model.parameters())
    return DistributedOptimizer(own, model.named_parameters(), compression, comm=comm, delayed=True, **options)


def made_up(model: nn.Module, rank: int, step: int) -> list[Tensor]:
    """A rank's gradients of a step, alike in every run."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]


def vector(optimizer: Any, model: nn.Module, values: Sequence[Tensor | None] | None = None) -> Tensor:
    """The parameters, or values of them, in the order of the exchange."""
    own = model.parameters() if values is None else values
    named = dict(zip(dict(model.named_parameters()), own, strict=True))
    found = [named[slot.name] for slot in optimizer.exchange.layout.slots]
    return torch.cat([torch.zeros(0) if value is None else value.detach().reshape(-1) for value in found])


def give(model: nn.Module, gradients: Gradients) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


def late(inner: Callable[[Any], torch.optim.Optimizer], steps: Sequence[Gradients]) -> list[Tensor]:
    """The models of plain training with these gradients: before each step that is given the next, and behind it."""
    model = net()
    optimizer, models = inner(model.parameters()), [flat(model)] * 2  # the first step has nothing to apply
    for gradients in steps:
        give(model, gradients)
        optimizer.step()
        models.append(flat(model))
    return models


# Laws


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("compression", EVERYTHING.values(), ids=EVERYTHING)
def test_sending_everything_is_dense_training_one_step_late(compression: Any, inner: Any) -> None:
    groups = False if compression is Compression.none else 2

    def body(comm: Communicator) -> tuple[list[list[Tensor]], list[Tensor]]:
        model = net()
        optimizer = wrap(model, comm, compression, inner, error_feedback=None, hierarchical=groups)
        gradients, models = [], []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, comm.rank, step).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            models.append(flat(model))
            optimizer.step()
        models.append(flat(model))
        optimizer.finish()
        optimizer.finish()  # does nothing more
        assert not optimizer.exchange.memory.residual.any()
        return gradients, [*models, flat(model)]

    ranks = run_in_process(4, body)
    by_step = [
        [torch.stack(parts) for parts in zip(*each, strict=True)] for each in zip(*(r[0] for r in ranks), strict=True)
    ]
    sums = [[(g[0] + g[1]) + (g[2] + g[3]) if groups else g[0] + g[1] + g[2] + g[3] for g in each] for each in by_step]
    expected = late(inner, [[total / 4 for total in each] for each in sums])
    for _, models in ranks:
        assert all(torch.equal(reached, one) for reached, one in zip(models, expected, strict=True))


@pytest.mark.parametrize("compression", SERVED.values(), ids=SERVED)
def test_what_is_applied_kept_and_in_flight_is_what_was_computed(compression: Any) -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        model = net()
        optimizer = wrap(model, comm, compression, error_feedback=None)
        expected, given, updates = vector(optimizer, model), [], []
        for step in range(STEPS):
            give(model, made_up(model, comm.rank, step))
            given.append(vector(optimizer, model, made_up(model, comm.rank, step)))
            optimizer.step()
            assert torch.equal(vector(optimizer, model), expected)  # without what is in flight
            updates.append(optimizer.exchange.update.clone())
            expected = expected - updates[-1]
        optimizer.finish()
        assert torch.equal(vector(optimizer, model), expected)
        return torch.stack(given), torch.stack(updates), optimizer.exchange.memory.residual.clone()

    ranks = run_in_process(3, body)
    given, updates = torch.stack([rank[0] for rank in ranks]), ranks[0][1]
    assert all(torch.equal(rank[1], updates) for rank in ranks)
    missing = lost(given, updates, [rank[2] for rank in ranks])
    assert bool((missing <= rounding(given) + rounding(3 * updates[None])).all())


@pytest.mark.parametrize("groups", [False, 2])
@pytest.mark.parametrize("compression", [TOPK, SHARDED], ids=["topk", "sharded"])
def test_forward_is_ahead_by_the_memory_and_the_gradient_in_flight(compression: Any, groups: Any) -> None:
    """And where it is evaluated, it is the model."""
    rate, coefficient = 0.1, 0.6

    def body(comm: Communicator) -> Tensor:
        model, seen = net(), list[Tensor]()
        optimizer = wrap(model, comm, compression, lambda p: torch.optim.SGD(p, rate), hierarchical=groups)
        model.register_forward_pre_hook(lambda *_: seen.append(vector(optimizer, model)))
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, comm.rank, step).backward()
            unsent = vector(optimizer, model, [p.grad for p in model.parameters() if p.grad is not None])
            kept, shares = optimizer.exchange.memory.residual.clone(), optimizer._ahead._shares.shares
            kept[optimizer.exchange.owned] /= comm.size
            unsent += kept
            optimizer.step()
            synchronous = vector(optimizer, model)
            loss(model, comm.rank, step + 1)  # while the exchange runs
            for number, slot in enumerate(optimizer.exchange.layout.slots):
                share = 0.0 if shares is None else coefficient * float(shares[number])
                ahead = (synchronous - seen[-1])[slot.offset : slot.stop]
                torch.testing.assert_close(ahead, rate * share * unsent[slot.offset : slot.stop], atol=1e-6, rtol=1e-4)
            assert torch.equal(synchronous, seen[-1]) == (step == 0)
            with torch.no_grad():
                loss(model, comm.rank, step)
            assert torch.equal(synchronous, seen[-1])
        optimizer.finish()
        return flat(model)

    ends = run_in_process(4, body)
    assert all(torch.equal(end, ends[0]) for end in ends)


# What scripts do


def test_the_first_step_and_the_last() -> None:
    """No state is made of gradients that are not there, and nothing decays; after a flush the model has it all."""

    def body(comm: Communicator) -> Tensor:
        model = net()
        optimizer = wrap(model, comm, SHARDED, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5))
        start = flat(model)
        ends = []
        for step in range(3):
            optimizer.step(lambda step=step: (optimizer.zero_grad(), loss(model, comm.rank, step).backward()))
            ends.append([int(state["step"]) for state in optimizer.state_dict()["state"].values()])
            assert step or torch.equal(flat(model), start)
        assert ends == [[], [1] * 4, [2] * 4]
        optimizer.flush()
        loss(model, comm.rank, 3).backward()
        optimizer.step()
        gradients = [parameter.grad for parameter in model.parameters()]
        optimizer.finish()
        assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
        assert not optimizer.exchange.memory.residual.any()
        return flat(model)

    ends = run_in_process(2, body)
    assert torch.equal(*ends)


def ends_alike(body: Callable[[bool, Communicator], list[Tensor]]) -> None:
    """A body ends with the same tensors with something in its steps and without; the first one on all ranks."""
    changed, plain = (run_in_process(2, partial(body, way)) for way in (True, False))
    assert torch.equal(changed[0][0], changed[1][0])
    for ours, others in zip(changed, plain, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


@pytest.mark.parametrize("error_feedback", [None, Anticipate()], ids=str)
def test_a_void_step_is_left_out_a_step_later_and_leaves_no_trace(error_feedback: Any) -> None:
    def body(spoils: bool, comm: Communicator) -> list[Tensor]:
        model = net()
        optimizer = wrap(model, comm, TOPK, INNER["adamw"], error_feedback=error_feedback)
        for step in (0, 1, math.nan, 2, 3, math.nan) if spoils else (0, 1, 2, 3):
            give(model, made_up(model, comm.rank, 7 if math.isnan(step) else int(step)))
            if math.isnan(step) and comm.rank == 1:
                next(model.parameters()).grad.view(-1)[3] = step  # type: ignore[union-attr]
            optimizer.step()
        optimizer.finish()
        assert optimizer.exchange.stats.skipped == 2 * spoils
        return [flat(model), *(state["exp_avg_sq"] for state in optimizer.state.values())]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hvd_sketch: step")
        ends_alike(body)


def test_a_parameter_without_a_gradient_is_left_alone_in_the_step_that_would_apply_it() -> None:
    given = [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3], [2, 3], [0, 1, 2, 3]]

    def some(model: nn.Module, rank: int, step: int) -> Gradients:
        return [g if at in given[step] else None for at, g in enumerate(made_up(model, rank, step))]

    def body(comm: Communicator) -> list[Tensor]:
        model, models = net(), []
        optimizer = wrap(model, comm, EVERYTHING["topk"], INNER["adamw"], error_feedback=None)
        for step in range(len(given)):
            models.append(flat(model))
            give(model, some(model, comm.rank, step))
            optimizer.step()
        return [*models, flat(model)]

    seen = run_in_process(2, body)
    means = [
        [
            None if a is None or b is None else (a + b) / 2
            for a, b in zip(some(net(), 0, at), some(net(), 1, at), strict=True)
        ]
        for at in range(len(given))
    ]
    for models in seen:
        assert all(torch.equal(one, two) for one, two in zip(models, late(INNER["adamw"], means), strict=False))


def test_a_gradient_clipped_after_synchronize_is_the_one_that_is_applied() -> None:
    """And what is synchronized and thrown away leaves no trace."""

    def body(throws_away: bool, comm: Communicator) -> list[Tensor]:
        model = net()
        optimizer = wrap(model, comm, TOPK)
        for step in range(STEPS):
            before, held = flat(model), optimizer.exchange.update.clone()
            if throws_away:
                give(model, made_up(model, comm.rank, 50))
                optimizer.synchronize()
                optimizer.zero_grad()
            give(model, made_up(model, comm.rank, step))
            optimizer.synchronize()
            torch.testing.assert_close(vector(optimizer, model, [p.grad for p in model.parameters()]), held)
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            with optimizer.skip_synchronize():
                optimizer.step()
            assert math.isclose(float((flat(model) - before).norm()), min(0.5, norm), rel_tol=1e-3)
        return [flat(model), optimizer.exchange.memory.residual]

    ends_alike(body)


@pytest.mark.parametrize("by_hand", [False, True])
def test_loss_scales_change_nothing_and_fall_on_all_ranks_a_step_late(by_hand: bool) -> None:
    """They double in every step; rank 1 alone overflows in one of them."""
    scales: dict[int, list[float]] = {0: [], 1: []}

    def body(scaled: bool, comm: Communicator) -> list[Tensor]:
        model = net()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, enabled=scaled)
        optimizer = wrap(model, comm, TOPK, lambda p: torch.optim.SGD(p, 0.1), grad_scaler=scaler, error_feedback=None)
        for step in range(STEPS):
            optimizer.zero_grad()
            value = loss(model, comm.rank, step)
            scaler.scale(value * math.inf if step == 3 and comm.rank == 1 else value).backward()
            if by_hand:
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
            if scaled:
                scales[comm.rank].append(math.log2(scaler.get_scale()))
        optimizer.finish()
        return [flat(model), optimizer.exchange.memory.residual]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hvd_sketch: step")
        ends_alike(body)
    assert scales[0] == scales[1] == [11.0, 12.0, 13.0, 14.0, 13.0, 14.0]


def test_a_scaler_is_searched_for_in_the_first_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through all objects takes some tens of milliseconds."""
    searched: list[type] = []

    def counted(kind: type) -> list[Any]:
        searched.append(kind)
        return instances_of(kind)

    monkeypatch.setattr(scaling, "instances_of", counted)

    def body(comm: Communicator) -> list[int]:
        model, scaler, counts = net(), torch.amp.GradScaler("cpu"), list[int]()
        optimizer = wrap(model, comm, TOPK)
        for step in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss(model, comm.rank, step)).backward()
            scaler.step(optimizer)
            scaler.update()
            counts.append(len(searched))
        optimizer.finish()
        return counts

    first, *others = run_in_process(1, body)[0]
    assert first > 0
    assert others == [first] * (STEPS - 1)


@pytest.mark.parametrize("groups", [False, 2])
@pytest.mark.parametrize("error_feedback", [None, Anticipate()], ids=str)
def test_a_run_goes_on_from_a_checkpoint_in_flight_to_the_bit(groups: Any, error_feedback: Any) -> None:
    saved: dict[int, Any] = {}

    def fresh(comm: Communicator) -> tuple[nn.Module, Any]:
        model = net()
        options = {"error_feedback": error_feedback, "hierarchical": groups}
        return model, wrap(model, comm, SHARDED, INNER["adamw"], **options)

    def train(comm: Communicator, model: nn.Module, optimizer: Any, steps: range) -> Tensor:
        for step in steps:
            optimizer.zero_grad()
            loss(model, comm.rank, step).backward()
            optimizer.step()
        return flat(model)

    def through(comm: Communicator) -> Tensor:
        model, optimizer = fresh(comm)
        train(comm, model, optimizer, range(4))
        state = model.state_dict(), optimizer.state_dict(), optimizer.memory_state_dict()
        saved[comm.rank] = copy.deepcopy(state)
        return train(comm, model, optimizer, range(4, 8))

    def again(comm: Communicator) -> Tensor:
        model, optimizer = fresh(comm)
        train(comm, model, optimizer, range(2))  # whatever was in flight before is given up
        for part, state in zip((model, optimizer), saved[comm.rank], strict=False):
            part.load_state_dict(state)
        with pytest.raises(ConfigurationError, match=r"does not fit.*delayed"):
            optimizer.load_memory_state_dict({**saved[comm.rank][2], "delayed": None})
        optimizer.load_memory_state_dict(saved[comm.rank][2])
        return train(comm, model, optimizer, range(4, 8))

    expected = run_in_process(4, through)
    assert all(torch.equal(end, one) for end, one in zip(run_in_process(4, again), expected, strict=True))


# Beside the script


def test_a_step_waits_for_nobody_and_its_thread_ends_with_the_optimizer() -> None:
    """Rank 1 steps when rank 0 has done so and computed on; without the delay both would wait for ever."""
    stepped = [threading.Event() for _ in range(STEPS)]

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(model, comm)
        for step in range(STEPS):
            loss(model, comm.rank, step).backward()
            if comm.rank == 1 and step:
                assert stepped[step - 1].wait(60)
            if step == 0:
                optimizer.exchange.comm.allreduce(torch.zeros(1), "together")
            optimizer.step()
            if comm.rank == 0:
                loss(model, comm.rank, step).backward()
                stepped[step].set()
        optimizer.finish()

    InProcessGroup(2, timeout=60).run(body)
    for _ in range(100):
        gc.collect()
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("hvd_sketch exchange")]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(left)


def test_a_rank_that_ends_is_told_in_the_next_step_of_the_others() -> None:
    told: list[str] = []

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(model, comm)
        for step in range(3):
            loss(model, comm.rank, step).backward()
            if comm.rank == 1 and step == 2:
                optimizer.finish()
                return
            optimizer.step()  # also that of which nothing will come
        before = flat(model)
        with pytest.raises(RankLostError, match="rank 1, which ended") as error:
            optimizer.step()
        told.extend(error.value.__notes__)
        assert torch.equal(flat(model), before)
        assert isinstance(optimizer.exchange.stats.steps, int)  # told once

    InProcessGroup(2, timeout=20).run(body)
    assert told == ["hvd_sketch: in the exchange of step 2, which ran beside computing"]


def test_a_problem_of_one_rank_is_told_on_all_a_step_late_and_training_goes_on() -> None:
    def body(comm: Communicator) -> Tensor:
        model = net()
        optimizer = wrap(model, comm)
        give(model, made_up(model, comm.rank, 0))
        if comm.rank == 1:
            first = next(model.parameters())
            first.grad = torch.zeros(first.shape).to_sparse()
        optimizer.step()
        for step in (1, 2, 3):
            give(model, made_up(model, comm.rank, step))
            if step == 1:
                with pytest.raises(ConfigurationError, match=r"rank 1: .* sparse gradient"):
                    optimizer.step()
            optimizer.step()
        optimizer.finish()
        return flat(model)

    one, other = run_in_process(2, body)
    assert torch.equal(one, other)
    assert not torch.equal(one, flat(net()))


def test_an_end_without_finish_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "hvd_sketch")
    for finishes in (True, False):
        model = net()
        optimizer = wrap(model, hvd_sketch.SingleProcess())
        loss(model, 0, 0).backward()
        optimizer.step()
        if finishes:
            optimizer.finish()
        else:
            with pytest.raises(ConfigurationError, match=r"in flight.*finish\(\)"):
                copy.deepcopy(optimizer)
        del optimizer
        gc.collect()
        told = [record.getMessage() for record in caplog.records if "in flight" in record.getMessage()]
        assert len(told) == (not finishes)


# What is refused


def accordion() -> Any:
    return hvd_sketch.Accordion(2.0, 20.0, 3, learning_rate=lambda: 0.1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"compression": Compression.sketch(ratio=10.0, buckets=2)}, "buckets"),
        ({"compression": Compression.topk(ratio=10.0, decay=0.9)}, "decay"),
        ({"compression": Compression.topk(schedule=accordion())}, "learning_rate"),
        ({"resync_every": 3}, "resync_every"),
        ({"error_feedback": StepAhead()}, "StepAhead"),
        ({"error_feedback": Anticipate(second_moments=FactoredMoments())}, "second_moments"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^delayed=True .*{why}"):
        wrap(net(), hvd_sketch.SingleProcess(), **{"inner": INNER["adamw"], **options})


def test_elastic_training_joining_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = wrap(net(), hvd_sketch.SingleProcess())
    with pytest.raises(ConfigurationError, match=r"join\(\) cannot .* delayed=True"):
        hvd_sketch.join()
    del optimizer
    with pytest.raises(ConfigurationError, match="delayed=True is for parameters on processors"):
        wrap(net().to("meta"), hvd_sketch.SingleProcess())
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(ConfigurationError, match="delayed=True does not go with elastic"):
        wrap(net(), hvd_sketch.SingleProcess())
