"""A memory is loaded whole or refused whole; where rank 0 alone has one, the others take over what is common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Accordion, Compression, ConfigurationError, EnergyTarget, Guard, Momentum, RankMismatchError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import Exchange
from hvd_sketch.saved import differences
from tests.support.compressors import BUCKETS, EVERY, HALF, IN_TURN, POWERSGD, SHARDED, TABLE, TOPK, TOTAL
from tests.support.simulation import heavy_tailed, lost, make, rounding, step

Spoil = Callable[[dict[str, Any]], Any]


def bits(state: Any) -> Any:
    """Something that is equal for equal states."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    return state.tolist() if isinstance(state, Tensor) else repr(state)


def ran(compressor: Compressor, steps: int = 4, **settings: Any) -> Exchange:
    exchange = make(compressor, SingleProcess(), **settings)
    for gradient in heavy_tailed(steps, TOTAL):
        step(exchange, gradient)
    return exchange


def refuse(exchange: Exchange, state: Any, told: str) -> None:
    """That loading raises an error with these words, and changes nothing."""
    before = bits(exchange.state_dict())
    with pytest.raises(ConfigurationError, match=rf"(?s)rank 0: the saved memory .*{told}.*Load each rank"):
        exchange.load_state_dict(state)
    assert bits(exchange.state_dict()) == before


@EVERY
def test_every_entry_of_every_state_is_looked_at(compressor: Compressor) -> None:
    """One that is missing, of another type, or of another shape, at every place of the state of every compressor."""
    exchange = ran(compressor)
    for place, key in places(exchange.state_dict()):
        for other in (None, "text", torch.zeros(3, 3), [1, 2, 3, 4, 5, 6, 7, 8]):
            state = copy.deepcopy(exchange.state_dict())
            holder: Any = state
            for name in place:
                holder = holder[name]
            if isinstance(holder, tuple) or (other is None and "scales" in f"{place} {key}"):
                continue
            holder[key] = other
            assert list(differences(state, exchange.state_form())), (place, key, other)
            if isinstance(holder, dict):
                del holder[key]
                refuse(exchange, state, f"no '{key}'")


def places(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Every key of every dict and list, with the way to it."""
    if not isinstance(state, (dict, list)):
        return []
    keys = list(state) if isinstance(state, dict) else list(range(len(state)))
    return [(path, key) for key in keys] + [found for key in keys for found in places(state[key], (*path, key))]


@pytest.mark.parametrize("other", TABLE.values(), ids=TABLE)
def test_a_memory_of_another_algorithm_is_refused(other: Compressor) -> None:
    saved, exchange = ran(other).state_dict(), ran(HALF)
    if saved["exchange"] == "SketchExchange" and not saved["cuts"]:
        exchange.load_state_dict(saved)  # sizes may be others
    elif saved["exchange"] == "SketchExchange":
        refuse(exchange, saved, "cuts has . entries, here 0")
    else:
        refuse(exchange, saved, f"exchange is '{saved['exchange']}', here 'SketchExchange'")


def spoilt(name: str, change: Spoil) -> Any:
    return pytest.param(change, id=name)


@pytest.mark.parametrize(
    "change",
    [
        spoilt("not finite", lambda state: state["memory"]["residual"].view(-1)[5].fill_(torch.nan)),
        spoilt("infinite", lambda state: state["memory"]["residual"].view(-1)[5].fill_(-torch.inf)),
        spoilt("half", lambda state: state["memory"].update(residual=state["memory"]["residual"].half())),
        spoilt("short", lambda state: state["memory"].update(residual=state["memory"]["residual"][1:])),
        spoilt("momentum", lambda state: state["memory"].update(velocity=state["memory"]["residual"])),
        spoilt("step", lambda state: state.update(step="3")),
        spoilt("extra", lambda state: state.update(more=1)),
        spoilt("layout", lambda state: state.update(parameters="weight[3x4]")),
    ],
)
@pytest.mark.parametrize("compressor", [HALF, TOPK, SHARDED, POWERSGD, BUCKETS], ids=lambda c: type(c).__name__)
def test_a_damaged_memory_is_refused(compressor: Compressor, change: Spoil) -> None:
    exchange = ran(compressor)
    state = copy.deepcopy(exchange.state_dict())
    change(state)
    refuse(exchange, state, "")


@pytest.mark.parametrize("state", [None, [], "text", {}], ids=str)
def test_what_is_no_memory_at_all_is_refused(state: Any) -> None:
    refuse(ran(TOPK), state, "")


def test_a_memory_of_another_momentum_is_refused() -> None:
    plain, corrected = ran(HALF), ran(HALF, momentum=Momentum(0.9))
    refuse(corrected, plain.state_dict(), "memory has no 'velocity'")
    refuse(plain, corrected.state_dict(), "memory has 'velocity', which is unknown here")


def test_a_memory_of_another_schedule_is_refused() -> None:
    def kind(schedule: Any) -> Exchange:
        return ran(Compression.topk(schedule=schedule, clip_norm=None))

    guard, target, accordion = Guard(20.0, every=2), EnergyTarget(0.5, every=2), Accordion(2.0, 20.0, 3)
    exchanges = [kind(schedule) for schedule in (guard, target, accordion, None)]
    names = ["Guard", "EnergyTarget", "Accordion"]
    for ours, exchange in zip(names, exchanges, strict=False):
        for theirs, other in zip(names, exchanges, strict=False):
            if ours != theirs:
                refuse(exchange, other.state_dict(), rf"observers\[0\].kind is '{theirs}', here '{ours}'")
        refuse(exchange, exchanges[-1].state_dict(), "observers has 0 entries, here 1")
        damaged = copy.deepcopy(exchange.state_dict())
        damaged["observers"][0]["state"].popitem()
        refuse(exchange, damaged, r"observers\[0\].state has no ")


def saved_after(compressor: Compressor, gradients: Tensor) -> list[dict[str, Any]]:
    """Every rank's state after so many steps."""

    def body(comm: Communicator) -> dict[str, Any]:
        exchange = make(compressor, comm)
        for gradient in gradients[comm.rank]:
            step(exchange, gradient)
        return exchange.state_dict()

    return run_in_process(len(gradients), body)


@EVERY
def test_from_a_rank_that_has_loaded_the_others_take_over_what_is_common(compressor: Compressor) -> None:
    """In the middle of a warm-up; the one that has loaded keeps its memory, that of the others is empty."""
    if hasattr(compressor, "warmup_steps") and not hasattr(compressor, "cols"):
        compressor = replace(compressor, warmup_steps=8)  # type: ignore[call-arg]
    gradients = heavy_tailed(3, 11, TOTAL)
    states = saved_after(compressor, gradients[:, :6])
    loader = 1

    def body(comm: Communicator) -> tuple[Tensor, Tensor, int, Any]:
        exchange = make(compressor, comm)
        if comm.rank == loader:
            exchange.load_state_dict(states[loader])
        updates = torch.stack([step(exchange, gradient) for gradient in gradients[comm.rank, 6:]])
        common = {key: value for key, value in exchange.state_dict().items() if key not in ("rank", "memory")}
        return updates, exchange.memory.residual, exchange.step, bits(common)

    runs = run_in_process(3, body)
    given = gradients[:, 6:].clone()
    given[loader, 0] += states[loader]["memory"]["residual"]
    for updates, _, number, common in runs:
        assert torch.equal(updates, runs[0][0])
        assert number == 11
        assert common == runs[0][3]
    missing = lost(given, runs[0][0], [run[1] for run in runs])
    assert (missing <= rounding(given) + rounding(3 * runs[0][0][None])).all()


Load = Callable[[Exchange, list[dict[str, Any]]], None]


def told_after(load: Load) -> list[str]:
    """What each of two ranks is told in the first step, after each has loaded in its way from the states of both."""
    states = saved_after(IN_TURN, heavy_tailed(2, 4, TOTAL))

    def body(comm: Communicator) -> str:
        exchange = make(IN_TURN, comm)
        load(exchange, states)
        try:
            step(exchange, heavy_tailed(TOTAL))
        except RankMismatchError as error:
            return str(error)
        return ""

    return run_in_process(2, body)


def test_a_rank_whose_memory_was_refused_is_told_on_all() -> None:
    def load(exchange: Exchange, states: list[dict[str, Any]]) -> None:
        with (
            pytest.raises(ConfigurationError, match="rank 1: the saved memory")
            if exchange.comm.rank
            else nullcontext()
        ):
            exchange.load_state_dict(states[0])

    told = told_after(load)
    assert told[0] == told[1]
    assert "rank 0 has '4', rank 1 has '0,saved-memory-refused'" in told[0]


def test_where_none_could_load_training_starts_with_an_empty_memory() -> None:
    def load(exchange: Exchange, states: list[dict[str, Any]]) -> None:
        rank = exchange.comm.rank
        with pytest.raises(ConfigurationError, match=f"rank {rank}: the saved memory"):
            exchange.load_state_dict(states[1 - rank])

    assert told_after(load) == ["", ""]
