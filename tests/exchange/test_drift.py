"""Ranks that come to hold different things are told so, all of them, before it matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hvd_sketch as hvd
from benchmarks.faults import flips
from hvd_sketch import Compression
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.exchange.drift import PERIOD
from tests.support.training import flat, loss, net

RANKS = 3
Change = Callable[[Any, torch.nn.Module, int], None]


def told_when(way: str, change: Change, steps: int) -> tuple[list[int], list[str]]:
    """What every rank is told, and in which step, when rank 1 is changed before one of them."""

    def body(comm: Communicator) -> tuple[int, str]:
        model = net()
        inner = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        optimizer: Any = hvd.DistributedOptimizer(inner, model.named_parameters(), comm=comm, **flips.WAYS[way]())
        for step in range(steps):
            optimizer.zero_grad()
            with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else torch.enable_grad():
                loss(model, comm.rank, step).backward()
            if comm.rank == 1:
                change(optimizer, model, step)
            try:
                optimizer.step()
            except hvd.RankMismatchError as error:
                return step, str(error)
        return -1, "not told"

    results = InProcessGroup(RANKS, timeout=60).run(body)
    return [step for step, _ in results], [text for _, text in results]


@pytest.mark.parametrize("way", flips.WAYS)
def test_a_learning_rate_of_its_own_is_told_in_the_step_that_it_would_be_used_in(way: str) -> None:
    def change(optimizer: Any, model: torch.nn.Module, step: int) -> None:
        if step == 3:
            optimizer.param_groups[0]["lr"] = 0.025

    steps, texts = told_when(way, change, 5)
    assert steps == [3] * RANKS
    assert len(set(texts)) == 1
    assert "numbers: rank 0 has 'group0.lr=0.05', rank 1 has 'group0.lr=0.025'" in texts[0]
    assert "rank 2 has" not in texts[0]


@pytest.mark.parametrize("way", ["stride", "anticipate", "step ahead"])
def test_a_parameter_of_its_own_is_told_within_a_hundred_steps(way: str) -> None:
    def change(optimizer: Any, model: torch.nn.Module, step: int) -> None:
        if step == 4:
            with torch.no_grad():
                model.get_parameter("2.weight")[7, 7] += 1e-6

    steps, texts = told_when(way, change, PERIOD + 6)
    assert len(set(steps)) == len(set(texts)) == 1
    assert 4 <= steps[0] < 4 + PERIOD
    assert "parameters: rank 0 has '2.weight=" in texts[0]


def test_an_update_of_its_own_is_told_in_the_next_step() -> None:
    """As a kernel would make it that differs."""

    def change(optimizer: Any, model: torch.nn.Module, step: int) -> None:
        contents = optimizer.exchange._update.contents
        if step == 2:
            optimizer.exchange._update.contents = lambda: [content + 1 for content in contents()]

    steps, texts = told_when("sharded", change, 5)
    assert steps == [3] * RANKS
    assert "update of step 2" in texts[0]


def test_what_is_equal_is_compared_in_silence_and_changes_nothing() -> None:
    def body(comm: Communicator) -> torch.Tensor:
        model = net()
        optimizer: Any = hvd.DistributedOptimizer(
            torch.optim.AdamW(model.parameters(), 1e-3),
            model.named_parameters(),
            Compression.stride(ratio=4),
            comm=comm,
        )
        for step in range(PERIOD + 5):
            optimizer.zero_grad()
            loss(model, comm.rank, step).backward()
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            optimizer.step()
        return flat(model)

    ends = InProcessGroup(2).run(body)
    assert torch.equal(*ends)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("way", [*flips.WAYS, *flips.HOSTS, *flips.METHODS, *flips.LETTERS])
@pytest.mark.filterwarnings("ignore:hvd_sketch. step 3 is void")
def test_a_flipped_bit_is_told_to_all_or_does_nothing(way: str, number: int) -> None:
    """Like the runs of ``make faults``."""
    flip = flips.draw(way, 1000 + number)
    assert flips.outcome(way, flip) in ("told", "no effect"), (way, flip)


def wrapped(rank: int, model: torch.nn.Module, comm: Communicator, other: str) -> Any:
    """An optimizer that differs on rank 1."""
    differs = other if rank == 1 else ""
    make: Any = torch.optim.Adagrad if differs == "optimizer" else torch.optim.SGD
    feedback = {"anticipate": hvd.Anticipate(), "step ahead": hvd.StepAhead()}.get(differs)
    named, compression = model.named_parameters(), Compression.topk(ratio=6, warmup_steps=0, anticipate=False)
    inner = make(model.parameters(), 0.02 if differs == "lr" else 0.05)
    return hvd.DistributedOptimizer(inner, named, compression, comm=comm, error_feedback=feedback)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ("anticipate", "error_feedback=Anticipate"),
        ("step ahead", "error_feedback=StepAhead"),
        ("optimizer", "optimizer=Adagrad"),
        ("lr", "group0.lr=0.02"),
    ],
)
def test_settings_that_differ_are_told_in_the_first_step(other: str, word: str) -> None:
    def body(comm: Communicator) -> str:
        model = net()
        optimizer = wrapped(comm.rank, model, comm, other)
        loss(model, comm.rank, 0).backward()
        try:
            optimizer.step()
        except hvd.RankMismatchError as error:
            return str(error)
        return "not told"

    texts = InProcessGroup(RANKS, timeout=60).run(body)
    assert len(set(texts)) == 1
    assert word in texts[0]
    assert "rank 1 has" in texts[0]


@pytest.mark.parametrize("way", ["none", "sharded", "stride", "anticipate", "step ahead"])
def test_ranks_that_round_differently_take_over_the_parameters_of_rank_0(way: str) -> None:
    """As often as asked for, where they would be told before long that they have drifted apart."""
    every = 7

    def body(comm: Communicator) -> list[torch.Tensor]:
        model, seen = net(), []
        inner = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        optimizer: Any = hvd.DistributedOptimizer(
            inner, model.named_parameters(), comm=comm, resync_every=every, **flips.WAYS[way]()
        )
        generator = torch.Generator().manual_seed(comm.rank)
        for step in range(PERIOD + 6):
            optimizer.zero_grad()
            with optimizer.step_ahead() if way == "step ahead" else torch.enable_grad():
                loss(model, comm.rank, step).backward()
            optimizer.step()
            if optimizer.exchange.step % every == 0:
                seen.append(flat(model))
                assert (optimizer.exchange.stats.drift > 0.0) == (comm.rank > 0)
                assert optimizer.exchange.stats.drift < 1e-5
            with torch.no_grad():
                for parameter in model.parameters() if comm.rank else ():
                    parameter.mul_(1.0 + 1e-7 * torch.randn(parameter.shape, generator=generator))
        return seen

    ends = InProcessGroup(RANKS, timeout=60).run(body)
    assert len(ends[0]) >= PERIOD // every
    for seen in zip(*ends, strict=True):
        assert all(torch.equal(each, seen[0]) for each in seen)


def test_how_often_parameters_are_taken_over_is_the_same_on_all_ranks() -> None:
    def body(comm: Communicator) -> str:
        model = net()
        inner = torch.optim.SGD(model.parameters(), 0.05)
        optimizer: Any = hvd.DistributedOptimizer(
            inner, model.named_parameters(), Compression.topk(ratio=6), comm=comm, resync_every=5 + comm.rank
        )
        loss(model, comm.rank, 0).backward()
        with pytest.raises(hvd.RankMismatchError, match="resync_every=") as told:
            optimizer.step()
        return str(told.value)

    assert len(set(InProcessGroup(RANKS, timeout=60).run(body))) == 1
    with pytest.raises(hvd.ConfigurationError, match="resync_every must be at least 0, got -1"):
        hvd.DistributedOptimizer(torch.optim.SGD(net().parameters(), 0.1), resync_every=-1)
