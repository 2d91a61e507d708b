"""Where messages take long, sharded's header rides in its codes: two crossings a step, and all else as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.comm import Communicator
from hvd_sketch.comm.hosts import find_hosts
from hvd_sketch.comm.in_process import InProcess, run_in_process
from hvd_sketch.compressors import Compressor
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.joining import stand_in
from hvd_sketch.memory import Momentum
from tests.support.compressors import SHARDED, TOTAL
from tests.support.simulation import heavy_tailed, make, parameters, step

SIZE, STEPS, FAR = 3, 9, 0.05
KINDS: dict[str, tuple[Compressor, Momentum | None]] = {
    "whole": (SHARDED, None),
    "buckets": (replace(SHARDED, buckets=3), None),
    "warm-up": (replace(SHARDED, warmup_steps=6), None),
    "momentum": (SHARDED, Momentum(0.9, masking=True)),
}
EVERY_KIND = pytest.mark.parametrize(("compressor", "momentum"), KINDS.values(), ids=KINDS)


class Counted(InProcess):
    """Notes which collectives it begins."""

    posted: list[str]

    def post_allreduce(self, tensor: Tensor, name: str) -> Any:
        self.posted.append("allreduce")
        return super().post_allreduce(tensor, name)

    def post_allgather(self, tensor: Tensor, name: str) -> Any:
        self.posted.append("allgather")
        return super().post_allgather(tensor, name)

    def post_alltoall(self, tensor: Tensor, name: str) -> Any:
        self.posted.append("alltoall")
        return super().post_alltoall(tensor, name)


def counted(comm: Communicator, crossing: float) -> Counted:
    comm.__class__ = Counted
    assert isinstance(comm, Counted)
    comm.posted, comm.crossing = [], crossing
    return comm


def test_a_step_is_two_crossings_and_no_more_bytes() -> None:
    gradients = heavy_tailed(SIZE, 4, TOTAL)

    def body(crossing: float) -> list[tuple[list[str], int]]:
        def on_rank(comm: Communicator) -> tuple[list[str], int]:
            exchange = make(SHARDED, counted(comm, crossing))
            for gradient in gradients[comm.rank, :3]:
                step(exchange, gradient)
            exchange.comm.posted.clear()  # type: ignore[attr-defined]
            before = exchange.stats.bytes_sent
            step(exchange, gradients[comm.rank, 3])
            return exchange.comm.posted, exchange.stats.bytes_sent - before  # type: ignore[attr-defined]

        return run_in_process(SIZE, on_rank)

    far, near = body(FAR), body(0.0)
    assert all(posted == ["alltoall", "allgather"] for posted, _ in far)
    assert all(posted == ["allreduce", "alltoall", "allgather"] for posted, _ in near)
    assert all(ours < theirs for (_, ours), (_, theirs) in zip(far, near, strict=True))


Events = list[tuple[Tensor, Tensor, int]]


def eventful(make: Callable[[Communicator], Exchange], size: int, *, joins: bool = True) -> Events:
    """Steps of every kind: void, flushed, one that lacks a gradient, some that a rank does not take part in."""
    gradients = heavy_tailed(size, STEPS, TOTAL)
    gradients[1, 2, 100] = torch.nan

    def on_rank(comm: Communicator) -> tuple[Tensor, Tensor, int]:
        exchange, updates = make(comm), []
        for number in range(STEPS - 2 * (joins and comm.rank == 2)):
            if number == 4 and comm.rank == 1:
                exchange.flush()
            for position, slot in enumerate(exchange.layout.slots):
                if number not in (5, 6) or position != 1 or (number == 6 and comm.rank == 0):
                    gradient = gradients[comm.rank, number, slot.offset : slot.stop]
                    exchange.submit(position, gradient.view(slot.shape))
            exchange.run()
            updates.append(exchange.update.clone())
        if joins:
            stand_in([exchange], comm)
        return torch.stack(updates), getattr(exchange, "part", exchange).memory.residual, exchange.step

    return run_in_process(size, on_rank)


def check_alike(far: Events, near: Events) -> None:
    for (updates, residual, count), (expected, kept, known) in zip(far, near, strict=True):
        assert torch.equal(updates.nan_to_num(9.0), expected.nan_to_num(9.0))
        assert torch.equal(residual, kept)
        assert count == known


@EVERY_KIND
def test_every_kind_of_step_is_as_it_is_with_a_header_by_itself(
    compressor: Compressor, momentum: Momentum | None
) -> None:
    def runs(crossing: float) -> Events:
        def begun(comm: Communicator) -> Exchange:
            comm.crossing = crossing
            return make(compressor, comm, momentum=momentum)

        return eventful(begun, SIZE)

    far = runs(FAR)
    check_alike(far, runs(0.0))
    assert all(torch.equal(updates[:-2].nan_to_num(9.0), far[2][0].nan_to_num(9.0)) for updates, _, _ in far[:2])
    assert far[0][2] == STEPS - 3  # one void, two without all ranks


@EVERY_KIND
def test_a_step_that_is_refused_changes_nothing(compressor: Compressor, momentum: Momentum | None) -> None:
    gradients = heavy_tailed(SIZE, STEPS, TOTAL)

    def refused(exchange: Exchange, gradient: Tensor, error: type[Exception]) -> str:
        before = exchange.memory.state_dict()
        with pytest.raises(error) as told:
            step(exchange, gradient)
        after = exchange.memory.state_dict()
        assert all(torch.equal(after[name], kept) for name, kept in before.items())
        return str(told.value)

    def on_rank(comm: Communicator) -> list[str]:
        comm.crossing = FAR
        exchange, texts = make(compressor, comm, momentum=momentum), []
        for gradient in gradients[comm.rank, :-2]:
            step(exchange, gradient)
        if comm.rank == 1:
            exchange.fail_together("it has one")
        texts.append(refused(exchange, gradients[comm.rank, -2], ConfigurationError))
        if comm.rank == 2:
            exchange.drift.note(torch.ones(3))
        texts.append(refused(exchange, gradients[comm.rank, -1], RankMismatchError))
        return texts

    told = run_in_process(SIZE, on_rank)
    assert all(texts == told[0] for texts in told)
    assert "rank 1: it has one" in told[0][0]
    assert "drifted apart" in told[0][1]


def test_between_hosts_of_one_memory_each_a_header_of_sums_rides() -> None:
    def runs(crossing: float) -> tuple[Events, list[str]]:
        posted: list[str] = []

        def begun(comm: Communicator) -> Exchange:
            hosts, _ = find_hosts(comm, 2)
            assert hosts is not None
            across = counted(hosts.across, crossing)
            comm.crossing = crossing
            if comm.rank == 0:
                across.posted = posted
            layout = SHARDED.layout(parameters().items())
            return SHARDED.exchange(layout, comm, average=True, device=torch.device("cpu"), hosts=hosts)

        return eventful(begun, 4, joins=False), posted

    (far, posted), (near, _) = runs(FAR), runs(0.0)
    check_alike(far, near)
    assert all(torch.equal(updates.nan_to_num(9.0), far[0][0].nan_to_num(9.0)) for updates, _, _ in far)
    assert posted[-2:] == ["alltoall", "allgather"]
    assert posted[-3] != "allreduce"
