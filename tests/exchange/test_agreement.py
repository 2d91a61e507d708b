"""Ranks that differ are told of it, all alike, and the step can be repeated or is kept unsent."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError, RankMismatchError, native, wire
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.base import Pending
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import Exchange, progress
from hvd_sketch.memory import Momentum
from hvd_sketch.sketch import geometry
from hvd_sketch.sparse import codec
from tests.support.compressors import BUCKETS, EVERY, HALF, PLAIN, SINGLE, TOTAL, conserved
from tests.support.simulation import SHAPES, Run, heavy_tailed, make, simulate, step, submit


def run_or_error(exchange: Exchange) -> str:
    try:
        exchange.run()
    except (ConfigurationError, RankMismatchError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def different_on_rank_1(first: Compressor, second: Compressor, **keywords: Any) -> list[str]:
    """What a step tells each of three ranks when rank 1 has other settings."""

    def body(comm: Communicator) -> str:
        exchange = make(second if comm.rank == 1 else first, comm, **keywords)
        submit(exchange, heavy_tailed(TOTAL))
        return run_or_error(exchange)

    return run_in_process(3, body)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("ratio=10.0", Compression.sketch(ratio=12.0, **PLAIN)),
        ("seed=0", Compression.sketch(ratio=10.0, seed=1, **PLAIN)),
        ("half=True", Compression.sketch(ratio=10.0, half=False, **PLAIN)),
        ("clip_norm=None", Compression.sketch(ratio=10.0, warmup_steps=0)),
        ("Sketch", Compression.topk(ratio=10.0, **PLAIN)),
        ("exclude=()", Compression.sketch(ratio=10.0, exclude=("*head*",), **PLAIN)),
        ("momentum=None", Compression.sketch(ratio=10.0, momentum=Momentum(0.9), **PLAIN)),
    ],
)
def test_settings_that_differ_are_told_on_all_ranks(name: str, other: Compressor) -> None:
    """The fifteen, item 15: fail early, loudly, and alike on all ranks."""
    messages = different_on_rank_1(Compression.sketch(ratio=10.0, **PLAIN), other)
    assert len(set(messages)) == 1
    for part in (
        "RankMismatchError",
        "settings: rank 0 has",
        name,
        "rank 1 has",
        "the same model, compression settings",
    ):
        assert part in messages[0]
    assert "rank 2" not in messages[0]


@pytest.mark.parametrize("keywords", [{"average": True}, {"momentum": Momentum(0.9)}])
def test_op_and_momentum_correction_that_differ_are_told(keywords: dict[str, Any]) -> None:
    def body(comm: Communicator) -> str:
        exchange = make(HALF, comm, **(keywords if comm.rank == 1 else {"average": False}))
        submit(exchange, heavy_tailed(TOTAL))
        return run_or_error(exchange)

    messages = run_in_process(2, body)
    assert len(set(messages)) == 1
    assert "RankMismatchError" in messages[0]


def test_parameters_that_differ_are_told_on_all_ranks() -> None:
    def body(comm: Communicator) -> str:
        renamed = {name.replace("b.", "c."): shape for name, shape in SHAPES.items()} if comm.rank == 2 else SHAPES
        exchange = make(HALF, comm, renamed)
        submit(exchange, heavy_tailed(TOTAL))
        return run_or_error(exchange)

    messages = run_in_process(3, body)
    assert len(set(messages)) == 1
    for part in ("parameters: rank 0 has", "b.weight[30x100]", "rank 2 has", "c.weight[30x100]"):
        assert part in messages[0]


class OfThisRank(threading.local):
    """A text of each thread's own."""

    text = "one"

    def __str__(self) -> str:
        return self.text

    __call__ = __str__


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (progress, "VERSION", "version"),
        (native, "identity", "kernel"),
        (geometry, "VERSION", "geometry"),
        (codec, "VERSION", "sparse_code"),
    ],
)
def test_other_software_is_told_on_all_ranks(
    module: Any, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_rank = OfThisRank()
    monkeypatch.setattr(module, name, of_rank)

    def body(comm: Communicator) -> str:
        of_rank.text = "other" if comm.rank == 1 else "one"
        exchange = make(HALF, comm)
        submit(exchange, heavy_tailed(TOTAL))
        return run_or_error(exchange)

    messages = run_in_process(3, body)
    assert len(set(messages)) == 1
    assert re.search(f"software: rank 0 has '.*{what}=one', rank 1 has '.*{what}=other'", messages[0]), messages[0]


def test_a_schedule_of_its_own_is_told_in_the_step_that_it_would_be_used_in() -> None:
    """One that follows something of the rank itself."""

    def body(comm: Communicator) -> list[str]:
        own = [10.0, 10.0, 20.0 if comm.rank == 1 else 10.0]
        told: list[str] = []
        exchange = make(Compression.topk(schedule=lambda step: own[step] if told else 10.0, clip_norm=None), comm)
        for _ in own:
            submit(exchange, heavy_tailed(TOTAL))
            told.append(run_or_error(exchange))
        return told

    told = run_in_process(3, body)
    assert told[0] == told[1] == told[2]
    assert [bool(each) for each in told[0]] == [False, False, True]
    assert "sizes of messages: rank 0 has" in told[0][2]


@EVERY
def test_a_problem_on_one_rank_is_told_on_all_and_the_step_can_be_repeated(compressor: Compressor) -> None:
    gradients = heavy_tailed(2, 6, TOTAL)
    expected = simulate(compressor, gradients)

    def body(comm: Communicator) -> tuple[str, Tensor]:
        exchange = make(compressor, comm)
        updates, message = [], ""
        for number, gradient in enumerate(gradients[comm.rank]):
            if number == 3:
                if comm.rank == 1:
                    exchange.fail_together("parameter 'a.weight' is odd; make it even")
                before = exchange.memory.residual.clone()
                submit(exchange, heavy_tailed(TOTAL, seed=9) * 50)
                message = run_or_error(exchange)
                assert torch.equal(exchange.memory.residual, before)
            updates.append(step(exchange, gradient))
        return message, torch.stack(updates)

    results = run_in_process(2, body)
    for message, updates in results:
        assert message.startswith("ConfigurationError")
        assert "rank 1: parameter 'a.weight' is odd" in message
        assert torch.equal(updates, expected[0].updates)


@pytest.mark.parametrize(
    ("compressor", "lie"),
    [
        (SINGLE, lambda sums: sums.flip(0)),
        (HALF, lambda sums: sums.flip(0)),
        (BUCKETS, lambda sums: sums.flip(0)),
        (HALF, lambda sums: sums / 8),  # the same choice, but another scale
    ],
    ids=["single", "oversampled", "buckets", "scale"],
)
def test_ranks_that_choose_differently_are_told_and_keep_the_step_unsent(
    compressor: Compressor, lie: Callable[[Tensor], Tensor]
) -> None:
    """A backend whose sums differ between ranks, in step 3 only."""
    gradients = heavy_tailed(2, 8, TOTAL)

    def body(comm: Communicator) -> tuple[Tensor, Exchange]:
        exchange, honest, updates = make(compressor, comm), comm.post_allreduce, []

        def dishonest(tensor: Tensor, name: str) -> Pending:
            pending = honest(tensor, name)
            if exchange.step == 3 and comm.rank == 1 and "table" in name:
                tensor[wire.HEADER :] = lie(tensor[wire.HEADER :])
            return pending

        comm.post_allreduce = dishonest  # type: ignore[method-assign]
        for number, gradient in enumerate(gradients[comm.rank]):
            if number == 3:
                with pytest.raises(RankMismatchError, match="in step 3 the ranks selected different coordinates"):
                    step(exchange, gradient)
                exchange.step += 1
                updates.append(torch.zeros(TOTAL))
            else:
                updates.append(step(exchange, gradient))
        return torch.stack(updates), exchange

    runs = [Run(updates, exchange) for updates, exchange in run_in_process(2, body)]
    assert torch.equal(runs[0].updates, runs[1].updates)
    assert conserved(runs, gradients)
