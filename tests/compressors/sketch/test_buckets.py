"""Buckets of a sketched step: the first ones travel while backward computes the rest, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hvd_sketch as hvd
from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.base import Pending
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors.sharded import shard_codes
from hvd_sketch.exchange import Exchange
from hvd_sketch.layout import Layout, small_or_named
from tests.support.compressors import TOTAL
from tests.support.ranks import Launcher, ranks, several
from tests.support.simulation import SHAPES, heavy_tailed, lost, make, parameters, rounding, simulate, step, submit
from tests.support.training import flat, loss, net, train

CUT = 3000
TWO = Compression.sketch(ratio=10.0, buckets=2, warmup_steps=0, clip_norm=None)


class Recording(SingleProcess):
    """Notes the names of the collectives that were started."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        self.names.append(name.rpartition(".")[2])
        return Pending(tensor)


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        (1, [0]),
        (2, [0, 300]),
        (3, [0, 200, 450]),
        (4, [0, 150, 300, 450]),
        (6, [0, 100, 200, 300, 400, 500]),
    ],
)
def test_parameters_given_last_come_first_in_buckets_of_about_equal_size(buckets: int, expected: list[int]) -> None:
    """Where a parameter ends near by, there; otherwise within one."""
    shapes = {"x": (10, 15), "bias": (7,), "a": (10, 15), "none": (0, 3), "b": (30, 10)}
    layout = Layout.of(parameters(shapes).items(), small_or_named(100), buckets)
    assert [where.start for where in layout.buckets] == expected
    assert layout.buckets[-1].stop == layout.total
    assert (layout.compressed, layout.total) == (600, 607)
    names = ["b", "a", "x"] if buckets > 1 else ["a", "b", "x"]
    assert [slot.name for slot in layout.slots] == [*names, "bias", "none"]
    begin = [slot.name for where in layout.buckets for slot in layout.slots[layout.positions(where)]]
    assert begin == [slot.name for slot in layout.slots if slot.numel]


def test_the_first_bucket_travels_while_backward_computes_the_next() -> None:
    comm, model = Recording(), net()
    optimizer: Any = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), TWO, comm=comm, error_feedback=None
    )
    train(optimizer, model, 2)
    comm.names.clear()
    started_before: list[list[str]] = []
    model.get_parameter("0.weight").register_hook(lambda gradient: started_before.append(list(comm.names)))
    loss(model, 0, 2).backward()
    assert started_before == [["table0"]]
    optimizer.step()
    assert comm.names == ["table0", "table1", "values0", "values1"]


def known_norms(gradients: Tensor) -> Tensor:
    """By rank, step and bucket: the norms known when the bucket starts, which in the first step are all."""
    norms = torch.stack([gradients[:, :, :CUT].norm(dim=2), gradients[:, :, CUT:].norm(dim=2)], dim=2)
    before = norms[:, :, 1].roll(1, dims=1)
    before[:, 0] = norms[:, 0, 1]
    return torch.stack([torch.hypot(norms[:, :, 0], before), norms.norm(dim=2)], dim=2)


def test_a_bucket_is_clipped_by_the_norms_known_when_it_starts() -> None:
    gradients = heavy_tailed(2, 10, TOTAL)
    norms = known_norms(gradients)
    limit = float(norms.median())
    factors = (limit / norms).clamp(max=1.0)
    clipped = torch.cat([gradients[:, :, :CUT] * factors[:, :, :1], gradients[:, :, CUT:] * factors[:, :, 1:]], dim=2)
    runs = simulate(replace(TWO, clip_norm=limit), gradients)
    missing = lost(clipped, runs[0].updates, [run.residual for run in runs])
    assert (missing <= rounding(clipped)).all()


@pytest.mark.parametrize("where", [0, CUT, TOTAL - 1])
def test_a_bad_gradient_in_any_bucket_voids_the_step(where: int) -> None:
    """Of the first bucket's values those of round 2 may be on their way already."""
    gradients = heavy_tailed(2, 7, TOTAL)
    poisoned = gradients.clone()
    poisoned[1, 4, where] = float("nan")

    def note(exchange: Exchange, number: int) -> None:
        residuals[exchange.comm.rank].append(exchange.memory.residual.clone())

    residuals: list[list[Tensor]] = [[], []]
    runs = simulate(TWO, poisoned, before_step=note)
    assert all(torch.equal(before[4], before[5]) for before in residuals)
    assert runs[0].updates[4].isnan().all()
    assert runs[0].exchange.stats.skipped == 1
    gradients[:, 4] = 0.0
    runs[0].updates[4] = 0.0
    missing = lost(gradients, runs[0].updates, [run.residual for run in runs])
    assert (missing <= rounding(gradients)).all()


def test_a_memory_of_other_buckets_is_refused() -> None:
    saved = make(TWO, SingleProcess()).state_dict()
    make(TWO, SingleProcess()).load_state_dict(saved)
    with pytest.raises(ConfigurationError, match=r"cuts has 1 entries, here 2.*flush\(\)"):
        make(replace(TWO, buckets=3), SingleProcess()).load_state_dict(saved)


def test_a_problem_that_shows_after_the_first_bucket_started_is_told_on_all_ranks() -> None:
    gradients = heavy_tailed(2, 4, TOTAL)

    def body(comm: Communicator) -> Tensor:
        exchange = make(TWO, comm)
        mine = gradients[comm.rank]
        for number in range(3):
            step(exchange, mine[number])
        submit(exchange, mine[3])
        if comm.rank == 1:
            exchange.fail_together("the last gradient is odd")
        before = exchange.memory.residual.clone()
        with pytest.raises(ConfigurationError, match="rank 1: the last gradient is odd"):
            exchange.run()
        assert torch.equal(exchange.memory.residual, before)
        return step(exchange, mine[3])

    again = run_in_process(2, body)
    expected = simulate(TWO, gradients)
    assert all(torch.equal(update, expected[0].updates[3]) for update in again)


def test_a_state_loaded_between_backward_and_step_forgets_what_was_started() -> None:
    exchange = make(TWO, SingleProcess())
    gradients = heavy_tailed(4, TOTAL)
    for gradient in gradients[:2]:
        step(exchange, gradient)
    state = exchange.state_dict()
    expected = step(exchange, gradients[2])
    exchange.submit(0, gradients[3, :CUT].view(SHAPES["b.weight"]))
    exchange.reset()
    exchange.load_state_dict(state)
    exchange.run()  # the ranks agree anew before anything starts early
    exchange.load_state_dict(state)
    assert torch.equal(step(exchange, gradients[2]), expected)


def test_a_number_of_buckets_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="buckets must be at least 1, got 0"):
        Compression.sketch(buckets=0)
    with pytest.raises(ConfigurationError, match="buckets must be at least 1, got -1"):
        Compression.sharded(buckets=-1)


@given(st.integers(1, 20), st.integers(1, 3000), st.integers(1, 9), st.data())
def test_the_parts_of_shards_tile_them_and_share_the_pairs(ranks: int, rows: int, buckets: int, data: Any) -> None:
    compressed = ranks * rows + data.draw(st.integers(0, ranks - 1))
    count = data.draw(st.integers(1, rows))
    parts = shard_codes(compressed, ranks, count, buckets)
    assert [where.start for where, _ in parts] == [0, *(where.stop for where, _ in parts[:-1])]
    assert parts[-1][0].stop == compressed
    for where, codec in parts:
        assert where.start % ranks == 0
        assert 1 <= codec.count <= (where.stop - where.start) // ranks
        assert codec.universe == -(-(where.stop - where.start) // ranks)
    assert count - 1 <= sum(codec.count for _, codec in parts) <= count
    assert len(parts) == max(1, min(buckets, count // 144))


def uneven(use_mpi4py: bool) -> list[Tensor]:
    """Training where rank 1 lacks the gradient that starts the first bucket, and where it is there but zero."""
    hvd.init()
    ends = []
    for missing in (True, False):
        model, comm = net(), None
        if use_mpi4py:
            from mpi4py import MPI

            comm = MPI.COMM_WORLD
        optimizer: Any = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), TWO, comm=comm
        )

        for number in range(8):
            optimizer.zero_grad()
            value = loss(model, hvd.rank(), number)
            if hvd.rank() == 1:
                inner = model[0](torch.ones(30)).square().mean()
                value = inner if missing else inner + 0.0 * value
            value.backward()
            optimizer.step()
        ends.append(flat(model))
    return ends


@pytest.mark.parametrize(("launcher", "use_mpi4py"), [("horovodrun-gloo", [False]), ("mpirun", [False, True])])
def test_a_rank_without_a_gradient_starts_its_buckets_later_and_nobody_waits_for_ever(
    launcher: Launcher, use_mpi4py: list[bool]
) -> None:
    for results in zip(*ranks(2, several, uneven, [(use,) for use in use_mpi4py], launcher=launcher), strict=True):
        for ends in results:
            assert torch.equal(ends[0], results[0][0])
            assert torch.equal(ends[0], ends[1])


class Late(Recording):
    """Starts nothing early, as simulated ranks on a GPU."""

    def starts_in_backward(self, device: torch.device) -> bool:
        return False


def test_where_nothing_may_start_in_backward_nothing_does_and_nothing_else_changes() -> None:
    late, early = Late(), Recording()
    exchanges = [make(TWO, comm) for comm in (late, early)]
    for number, gradient in enumerate(heavy_tailed(3, TOTAL)):
        before = [len(late.names), len(early.names)]
        for exchange in exchanges:
            submit(exchange, gradient)
        assert [len(late.names), len(early.names)] == [before[0], before[1] + (number > 0)]
        for exchange in exchanges:
            exchange.run()
        assert torch.equal(exchanges[0].update, exchanges[1].update)
    assert sorted(late.names) == sorted(early.names)
