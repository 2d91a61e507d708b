"""Ranks of a host share a memory: the laws of every compressor, and what all ranks are told, by groups of ranks."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_sketch as hvd
from hvd_sketch import Compression, ConfigurationError, RankMismatchError, wire
from hvd_sketch.comm import Communicator, Pending, shared_memory
from hvd_sketch.comm.hosts import Asked, find_hosts
from hvd_sketch.comm.in_process import InProcessGroup, run_in_process
from hvd_sketch.comm.shared_memory import SharedMemory
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import HierarchicalExchange
from hvd_sketch.exchange.common_share import CommonShare
from hvd_sketch.exchange.division import Division, Piece, divide
from hvd_sketch.exchange.joining import stand_in
from hvd_sketch.frontends.or_dense import OrDense
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum
from hvd_sketch.sketch.narrow import NarrowSketches
from tests.support.compressors import EVERY, HALF, PLAIN, POWERSGD, SHARDED, SINGLE, TOPK, at_ratio_one
from tests.support.ranks import ranks
from tests.support.simulation import heavy_tailed, lost, parameters, rounding, simulate, step
from tests.support.training import flat, loss, net

SIZE = 8
SHAPES = {"a.bias": (40,), "a.weight": (160, 60), "b.norm": (30,), "b.weight": (120, 100)}
TOTAL, COMPRESSED = 21670, 21600
SOME = pytest.mark.parametrize(
    "compressor", [SHARDED, HALF, TOPK, POWERSGD], ids=["sharded", "sketch", "topk", "powersgd"]
)
LOCAL = pytest.mark.parametrize("local", [2, 4])


def make(
    compressor: Compressor, comm: Communicator, local: Asked, *, average: bool = True, momentum: Momentum | None = None
) -> HierarchicalExchange:
    layout = compressor.layout(parameters(SHAPES).items())
    exchange = compressor.exchange(
        layout,
        comm,
        average=average,
        device=torch.device("cpu"),
        momentum=momentum,
        hosts=find_hosts(comm, local)[0],
    )
    assert isinstance(exchange, HierarchicalExchange)
    return exchange


Ran = tuple[Tensor, HierarchicalExchange]


def exchanged(compressor: Compressor, gradients: Tensor, local: int, **keywords: Any) -> list[Ran]:
    """Every rank's updates, and its exchange."""

    def body(comm: Communicator) -> Ran:
        exchange = make(compressor, comm, local, **keywords)
        return torch.stack([step(exchange, gradient) for gradient in gradients[comm.rank]]), exchange

    return run_in_process(len(gradients), body)


def by_hosts(gradients: Tensor, local: int) -> Tensor:
    """The mean gradient of every host, summed as its ranks do."""
    return torch.stack([host.sum(dim=0) / local for host in gradients.split(local)])


def pieces_of(exchange: HierarchicalExchange, local: int) -> list[list[Piece]]:
    """The parts that it is cut into."""
    return divide(exchange.layout, local, whole_tensors=exchange._compressor.wants_whole_tensors)


def places(exchange: HierarchicalExchange, number: int, local: int) -> Tensor:
    """Where in the whole vector the coordinates of a part are, in the part's order."""
    starts = {piece.name: piece.start for piece in pieces_of(exchange, local)[number]}
    return torch.cat([torch.arange(slot.numel) + starts[slot.name] for slot in exchange.part.layout.slots])


def kept(runs: Sequence[Ran], local: int) -> list[Tensor]:
    """What every host has not sent."""
    memories = []
    for first in range(0, len(runs), local):
        whole = torch.zeros(TOTAL)
        for number, (_, exchange) in enumerate(runs[first : first + local]):
            whole[places(exchange, number, local)] = exchange.part.memory.residual
        memories.append(whole)
    return memories


@EVERY
@LOCAL
def test_what_a_host_sends_and_keeps_is_what_its_ranks_computed(compressor: Compressor, local: int) -> None:
    gradients = heavy_tailed(SIZE, 10, TOTAL)
    runs = exchanged(compressor, gradients, local)
    updates = runs[0][0]
    assert all(torch.equal(its, updates) for its, _ in runs)
    computed, hosts = by_hosts(gradients, local), SIZE // local
    missing = lost(computed, updates, kept(runs, local))
    assert bool((missing <= rounding(computed) + rounding(hosts * updates[None])).all())
    assert all(memory.any() for memory in kept(runs, local))
    assert sum(exchange.part.memory.residual.numel() for _, exchange in runs) == hosts * TOTAL


@EVERY
@LOCAL
def test_a_part_is_the_exchange_of_as_many_ranks_as_there_are_hosts(compressor: Compressor, local: int) -> None:
    gradients = heavy_tailed(SIZE, 5, TOTAL)
    runs = exchanged(compressor, gradients, local)
    for number, pieces in enumerate(pieces_of(runs[0][1], local)):
        where = places(runs[number][1], number, local)
        shapes = {piece.name: piece.shape for piece in pieces}
        flat_runs = simulate(compressor, by_hosts(gradients, local)[..., where], shapes)
        assert torch.equal(runs[0][0][:, where], flat_runs[0].updates)
        assert torch.equal(runs[number][1].part.memory.residual, flat_runs[0].residual)


@EVERY
@LOCAL
def test_sending_everything_is_the_mean_of_all_ranks(compressor: Compressor, local: int) -> None:
    gradients = heavy_tailed(SIZE, 2, TOTAL)
    updates, exchange = exchanged(at_ratio_one(compressor), gradients, local)[0]
    assert bool(((updates.double() - gradients.double().mean(0)).abs() <= rounding(gradients)).all())
    assert exchange.stats.ratio == pytest.approx(1.0, rel=0.05)


def test_a_sum_and_a_clip_by_the_norm_of_the_hosts_mean() -> None:
    gradients, limit = heavy_tailed(SIZE, 3, TOTAL), 100.0
    clipped = Compression.sharded(ratio=10.0, schedule=lambda step: 1.0, clip_norm=limit)
    factors = (limit / by_hosts(gradients, 2).norm(dim=2, keepdim=True)).clamp(max=1.0)
    expected = (by_hosts(gradients, 2) * factors).sum(0)
    for average, total in ((True, expected / 4), (False, 2 * expected)):
        runs = exchanged(clipped, gradients, 2, average=average)
        assert torch.allclose(runs[0][0], total, rtol=1e-4, atol=1e-6)
        assert [exchange.stats.clip for _, exchange in runs[::2]] == pytest.approx(factors[:, -1, 0].tolist())
    assert bool((factors < 1.0).any())


def test_momentum_is_a_hosts() -> None:
    gradients, momentum = heavy_tailed(SIZE, 4, TOTAL), Momentum(0.5)
    runs = exchanged(TOPK, gradients, 2, momentum=momentum)
    where = places(runs[1][1], 1, 2)
    shapes = {piece.name: piece.shape for piece in pieces_of(runs[0][1], 2)[1]}
    flat_runs = simulate(TOPK, by_hosts(gradients, 2)[..., where], shapes, momentum=momentum)
    assert torch.equal(runs[0][0][:, where], flat_runs[0].updates)


@SOME
def test_a_run_goes_on_from_what_was_saved_to_the_bit(compressor: Compressor) -> None:
    gradients = heavy_tailed(4, 8, TOTAL)

    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        one, other = (make(compressor, comm, 2) for _ in range(2))
        for exchange in (one, other):
            exchange.follow_memory()
        for gradient in gradients[comm.rank, :4]:
            step(one, gradient)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        assert torch.equal(one.memory.residual, other.memory.residual)
        rest = [torch.stack([step(each, gradient) for gradient in gradients[comm.rank, 4:]]) for each in (one, other)]
        return rest[0], rest[1]

    assert all(torch.equal(one, other) for one, other in run_in_process(4, body))


def test_ranks_that_load_nothing_take_over_how_far_training_has_come() -> None:
    """Rank 0 alone loads; of its peer on the other host, and of the other parts, memories are empty."""
    gradients = heavy_tailed(4, 6, TOTAL)

    def body(comm: Communicator) -> tuple[Tensor, list[int]]:
        one, other = (make(HALF, comm, 2) for _ in range(2))
        for gradient in gradients[comm.rank, :3]:
            step(one, gradient)
        if comm.rank == 0:
            other.load_state_dict(one.state_dict())
        updates = torch.stack([step(other, gradient) for gradient in gradients[comm.rank, 3:]])
        return updates, [other.step, other.part.step]

    runs = run_in_process(4, body)
    assert all(torch.equal(updates, runs[0][0]) and steps == [6, 6] for updates, steps in runs)


def test_hosts_of_another_size_do_not_fit() -> None:
    def body(comm: Communicator) -> None:
        saved, here = make(SHARDED, comm, 2), make(SHARDED, comm, 4)
        with pytest.raises(ConfigurationError, match=f"rank {comm.rank}: the saved memory does not fit"):
            here.load_state_dict(saved.state_dict())

    run_in_process(SIZE, body)


@SOME
def test_a_flush_that_one_rank_asks_for_empties_every_memory(compressor: Compressor) -> None:
    gradients = heavy_tailed(4, 4, TOTAL)

    def body(comm: Communicator) -> Ran:
        exchange = make(compressor, comm, 2)
        updates = []
        for number, gradient in enumerate(gradients[comm.rank]):
            if number == 3 and comm.rank == 3:
                exchange.flush()
            updates.append(step(exchange, gradient))
        return torch.stack(updates), exchange

    runs = run_in_process(4, body)
    assert not any(exchange.part.memory.residual[:COMPRESSED].any() for _, exchange in runs)
    computed = by_hosts(gradients, 2)
    assert bool((lost(computed, runs[0][0], kept(runs, 2)) <= 2 * rounding(computed)).all())


@SOME
@pytest.mark.parametrize("local", [False, 2])
def test_a_step_is_taken_back_for_some_parameters_or_all_with_its_flush(compressor: Compressor, local: Asked) -> None:
    gradients = heavy_tailed(4, 3, TOTAL)

    def body(comm: Communicator) -> None:
        layout, hosts = compressor.layout(parameters(SHAPES).items()), find_hosts(comm, local)[0]
        exchange = compressor.exchange(layout, comm, average=True, device=torch.device("cpu"), hosts=hosts)
        mine = getattr(exchange, "part", exchange)
        first, second, third = gradients[comm.rank]
        step(exchange, first)
        before, undo = mine.memory.residual.clone(), exchange.snapshot()
        update, after = step(exchange, second), mine.memory.residual.clone()
        undo(at for at, slot in enumerate(layout.slots) if slot.name == "a.weight")
        for slot in mine.layout.slots:
            where, expected = slice(slot.offset, slot.stop), before if slot.name == "a.weight" else after
            assert torch.equal(mine.memory.residual[where], expected[where])
        undo()
        assert torch.equal(mine.memory.residual, before)
        assert torch.equal(step(exchange, second), update)
        exchange.flush()
        undo = exchange.snapshot()
        for _ in range(2):
            step(exchange, third)
            assert not mine.memory.residual[: mine.layout.compressed].any()
            undo()

    run_in_process(4, body)


@SOME
@pytest.mark.filterwarnings("ignore:hvd_sketch. step")
def test_a_step_is_void_for_all_where_one_rank_is_not_finite(compressor: Compressor) -> None:
    gradients = heavy_tailed(4, 5, TOTAL)
    spoilt = gradients.clone()
    spoilt[3, 2, 100] = math.nan
    without = exchanged(compressor, gradients[:, [0, 1, 3, 4]], 2)
    runs = exchanged(compressor, spoilt, 2)
    for (updates, exchange), (others, _) in zip(runs, without, strict=True):
        assert bool(updates[2].isnan().all())
        assert torch.equal(updates[[0, 1, 3, 4]], others)
        assert (exchange.stats.steps, exchange.stats.skipped, exchange.step) == (5, 1, 4)


def test_a_void_step_is_told_once_with_rank_and_parameter() -> None:
    spoilt = heavy_tailed(4, 3, TOTAL)
    spoilt[3, 1:, -100] = math.inf
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exchanged(SHARDED, spoilt, 2)
    assert len(told) == 1
    assert "step 1 is void on all ranks: the gradient of 'b.weight' on rank 3" in str(told[0].message)


def test_a_problem_of_one_rank_is_told_on_all_and_the_step_can_be_repeated() -> None:
    gradients = heavy_tailed(4, 3, TOTAL)
    expected = exchanged(SINGLE, gradients, 2)[0][0]

    def body(comm: Communicator) -> Tensor:
        exchange = make(SINGLE, comm, 2)
        updates = []
        for number, gradient in enumerate(gradients[comm.rank]):
            if number == 1:
                if comm.rank == 2:
                    exchange.fail_together("it has one")
                with pytest.raises(ConfigurationError, match="rank 2: it has one"):
                    step(exchange, gradient)
            updates.append(step(exchange, gradient))
        return torch.stack(updates)

    assert all(torch.equal(updates, expected) for updates in run_in_process(4, body))


def test_ranks_that_drift_apart_are_told_on_all() -> None:
    def body(comm: Communicator) -> None:
        exchange = make(TOPK, comm, 2)
        rate = [0.1]
        exchange.watch(parameters(SHAPES), lambda: [{"lr": rate[0]}])
        step(exchange, torch.ones(TOTAL))
        if comm.rank == 3:
            rate[0] = 0.2
        with pytest.raises(RankMismatchError, match=r"(?s)drifted apart.*rank 3 has"):
            step(exchange, torch.ones(TOTAL))

    run_in_process(4, body)


def test_a_part_that_fails_fails_on_all_ranks() -> None:
    """The sums of one rank's peers are not alike, so that they choose differently; the other parts are well."""
    gradients = heavy_tailed(4, 3, TOTAL)

    def body(comm: Communicator) -> None:
        exchange = make(SINGLE, comm, 2)
        across = exchange.part.comm
        honest = across.post_allreduce

        def dishonest(tensor: Tensor, name: str) -> Pending:
            pending = honest(tensor, name)
            if exchange.step == 1 and comm.rank == 3 and "table" in name:
                tensor[wire.HEADER :] = tensor[wire.HEADER :].flip(0)
            return pending

        across.post_allreduce = dishonest  # type: ignore[method-assign]
        step(exchange, gradients[comm.rank, 0])
        with pytest.raises(RankMismatchError, match="in step 1 the ranks selected different coordinates"):
            step(exchange, gradients[comm.rank, 1])

    run_in_process(4, body)


def test_what_no_rank_has_a_gradient_for_is_left_alone() -> None:
    gradients = heavy_tailed(4, 4, TOTAL)

    def body(comm: Communicator) -> None:
        exchange = make(SHARDED, comm, 2)
        exchange.follow_memory()
        position = exchange.layout.index()["b.weight"]
        slot = exchange.layout.slots[position]
        for gradient in gradients[comm.rank, :3]:
            step(exchange, gradient)
        before = exchange.memory.residual[slot.offset : slot.stop].clone()
        for at, other in enumerate(exchange.layout.slots):
            if at != position:
                exchange.submit(at, gradients[comm.rank, 3, other.offset : other.stop].view(other.shape))
        exchange.run()
        assert exchange.absent == (position,)
        assert not exchange.update_of(position).any()
        assert torch.equal(exchange.memory.residual[slot.offset : slot.stop], before)
        assert bool(before.any())

    run_in_process(4, body)


@SOME
def test_a_rank_without_data_carries_on_with_its_hosts_memory(compressor: Compressor) -> None:
    """Rank 1 has two steps, and rank 5, on the other host, has four, of which the last one is its own."""
    gradients, steps = heavy_tailed(6, 4, TOTAL), (3, 2, 3, 3, 3, 4)

    def body(comm: Communicator) -> Ran:
        exchange = make(compressor, comm, 3)
        updates = [step(exchange, gradient) for gradient in gradients[comm.rank, : steps[comm.rank]]]
        assert stand_in([exchange], comm) == 5
        return torch.stack(updates), exchange

    runs = run_in_process(6, body)
    computed = gradients.clone()
    for rank, number in enumerate(steps):
        computed[rank, number:] = 0.0
    computed = by_hosts(computed, 3)
    updates = runs[5][0]
    missing = lost(computed, updates, kept(runs, 3))
    assert bool((missing <= rounding(computed) + rounding(2 * updates[None])).all())
    assert all(exchange.step == exchange.part.step == 2 for _, exchange in runs)


def test_a_followed_memory_is_what_the_host_has_not_sent_and_of_what_is_owned_a_share() -> None:
    gradients = heavy_tailed(4, 3, TOTAL)

    def body(comm: Communicator) -> Ran:
        exchange = make(SHARDED, comm, 2)
        exchange.follow_memory()
        return torch.stack([step(exchange, gradient) for gradient in gradients[comm.rank]]), exchange

    runs = run_in_process(4, body)
    for host, whole in enumerate(kept(runs, 2)):
        for number in range(2):
            owned = places(runs[number][1], number, 2)[runs[2 * host + number][1].part.owned]
            whole[owned] /= 2
        assert all(torch.equal(exchange.memory.residual, whole) for _, exchange in runs[2 * host : 2 * host + 2])


def test_what_hosts_have_in_common_is_measured_of_all_that_they_have_not_sent() -> None:
    """Of owned coordinates the whole, though a host's errors are a share of them; as ranks without groups do."""
    gradients = heavy_tailed(4, 3, TOTAL)

    def body(comm: Communicator) -> tuple[Tensor, Tensor, Ran]:
        exchange, shares = make(SHARDED, comm, 2), CommonShare()
        shares.attach(exchange)
        updates = torch.stack([step(exchange, gradient) for gradient in gradients[comm.rank]])
        exchange.rounds.sum_coarsely = exchange.rounds.sum_values  # type: ignore[method-assign]
        return shares._measure(exchange), exchange.unsent(), (updates, exchange)

    runs = run_in_process(4, body)
    memories = torch.stack(kept([ran for *_, ran in runs], 2))
    assert torch.allclose(torch.stack([unsent for _, unsent, _ in runs]).mean(0), memories.mean(0))
    exchange = runs[0][2][1]
    slots = exchange.layout.slots
    sketches = NarrowSketches([(slot.offset, slot.stop) for slot in slots], torch.device("cpu"))
    common = sketches.measure(memories.sum(0), exchange.step, slice(0))[0].square().sum(1)
    errors = torch.stack([exchange.memory.residual for *_, (_, exchange) in runs[::2]])
    energies = torch.stack([errors[:, slot.offset : slot.stop].square().sum() for slot in slots])
    assert torch.allclose(runs[0][0], common / (2 * energies), rtol=1e-4)


@pytest.mark.parametrize("average", [True, False])
def test_the_bytes_of_a_hosts_interface_do_not_grow_with_its_ranks(average: bool) -> None:
    """Two hosts, and for every part the same bytes as for the whole by one rank a host, but for headers."""
    large = {"weight": (400, 500)}
    sent = []
    for local in (1, 2, 4):

        def body(comm: Communicator, local: int = local) -> tuple[int, int]:
            layout = SHARDED.layout(parameters(large).items())
            hosts, _ = find_hosts(comm, local)
            exchange = SHARDED.exchange(layout, comm, average=average, device=torch.device("cpu"), hosts=hosts)
            step(exchange, heavy_tailed(layout.total, seed=comm.rank))
            before = exchange.stats.bytes_sent, exchange.stats.local_bytes
            step(exchange, heavy_tailed(layout.total, seed=9 + comm.rank))
            return exchange.stats.bytes_sent - before[0], exchange.stats.local_bytes - before[1]

        told = run_in_process(2 * local, body)
        sent.append(sum(across for across, _ in told[:local]))
        dense = 4 * 200_000 * 2 * (local - 1) / local
        assert all(inside == pytest.approx(dense, rel=0.01) for _, inside in told)
    assert sent[1] == pytest.approx(sent[0], rel=0.05)
    assert sent[2] == pytest.approx(sent[0], rel=0.05)


def found(hosts: Sequence[int], asked: Asked) -> list[Any]:
    """What ranks on these hosts find: the sizes inside and across, and what is logged."""

    def body(comm: Communicator) -> tuple[tuple[int, int] | None, str]:
        its, note = find_hosts(comm, asked)
        return None if its is None else (its.local.size, its.across.size), note

    return InProcessGroup(len(hosts), timeout=60, hosts=hosts).run(body)


@pytest.mark.parametrize(
    ("hosts", "asked", "expected"),
    [
        ((0, 0, 1, 1), None, (2, 2)),
        ((0, 1, 0, 1), None, (2, 2)),
        ((0, 1, 2, 3), None, None),
        ((0, 0, 0, 0), None, None),
        ((0, 0, 0, 0), True, (4, 1)),
        ((0, 0, 0, 0), 2, (2, 2)),
        ((0, 0, 1, 1), 4, (4, 1)),
        ((0, 0, 1, 1), False, None),
        ((0, 0, 1, 1), 1, None),
    ],
)
def test_hosts_are_found_by_themselves_where_there_are_several_of_several_ranks(
    hosts: Sequence[int], asked: Asked, expected: tuple[int, int] | None
) -> None:
    assert found(hosts, asked) == [(expected, "")] * 4


def test_uneven_hosts_exchange_by_rank_and_say_so_and_are_refused_where_hosts_are_asked_for() -> None:
    note = "the hosts have 3, 1 ranks, so that each rank has a memory of its own"
    assert found((0, 0, 0, 1), None) == [(None, note)] * 4
    with pytest.raises(ConfigurationError, match="the hosts have 3, 1 ranks; start as many on each"):
        found((0, 0, 0, 1), True)
    with pytest.raises(ConfigurationError, match="hierarchical=3 makes no groups of 4 ranks"):
        found((0, 0, 0, 1), 3)
    with pytest.raises(ConfigurationError, match="nobody tells rank 0 which ranks share its host"):
        run_in_process(2, lambda comm: find_hosts(comm, True))


def test_a_model_whose_parts_are_too_small_is_exchanged_by_rank_unless_hosts_were_asked_for() -> None:
    """Of 4300 parameters every part has 100 that travel whole, one of the two also a small piece.

    From the script runner, which would train a model dense that is too small by itself, as well.
    """

    def body(comm: Communicator) -> list[str]:
        model = net()
        topk = Compression.topk(ratio=30.0, anticipate=False, **PLAIN)
        asked: list[tuple[Asked, Compressor]] = [(None, topk), (None, OrDense(wanted=topk)), (True, topk)]
        kinds = []
        for each, compression in asked:
            plain, named = torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
            optimizer = hvd.DistributedOptimizer(plain, named, compression, comm=comm, hierarchical=each)
            try:
                kinds.append(type(optimizer.exchange).__name__)
            except ConfigurationError as error:
                kinds.append(type(error).__name__)
        return kinds

    kinds = ["TopKExchange", "TopKExchange", "NothingGainedError"]
    assert InProcessGroup(8, hosts=[0, 0, 0, 0, 1, 1, 1, 1]).run(body) == [kinds] * 8


@pytest.mark.parametrize("whole_tensors", [False, True])
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    "shapes", [SHAPES, {"flat": (1000,)}, {"wide": (2, 3001), "thin": (700, 3)}, {"tiny": (2,), "none": (0, 3)}]
)
def test_parts_cover_every_coordinate_once_and_are_about_even(
    shapes: dict[str, Any], count: int, whole_tensors: bool
) -> None:
    layout = Layout.of(parameters(shapes).items(), lambda name, parameter: parameter.dim() == 1)
    parts = divide(layout, count, whole_tensors=whole_tensors)
    covered = torch.zeros(layout.total, dtype=torch.int64)
    for pieces in parts:
        for piece in pieces:
            assert math.prod(piece.shape) == piece.numel
            covered[piece.start : piece.start + piece.numel] += 1
    assert bool((covered == 1).all())
    sizes = [sum(piece.numel for piece in pieces) for pieces in parts]
    assert max(sizes) - min(sizes) <= layout.total / count / 4 + 2


def test_every_part_has_its_share_of_what_is_compressed_and_of_what_is_sent_whole() -> None:
    """However small it is there: a matrix that is compressed has no part that is sent whole."""
    compressor = Compression.topk(ratio=10.0, dense_below=600, **PLAIN)
    shapes = {"a": (41, 30), "b": (30,), "c": (700,), "d": (8, 100)}
    layout = compressor.layout(parameters(shapes).items())
    for part in Division(layout, 4, compressor).layouts:
        assert {slot.name for slot in part.slots[:2]} == {"a", "d"}
        assert {slot.name for slot in part.slots[2:]} == {"b", "c"}
        for slot, whole in zip(part.slots, layout.slots, strict=True):
            assert abs(slot.numel - whole.numel / 4) <= whole.numel / whole.shape[0]


def trained(comm: Any, rank: int, resume: Callable[[Any, Any], Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Six anticipating steps of a small network, saved and gone on from in the middle; parameters, counters."""
    model = net()
    compression = Compression.sharded(ratio=8.0, **PLAIN)

    def wrap(model: torch.nn.Module) -> Any:
        plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        return hvd.DistributedOptimizer(plain, model.named_parameters(), compression, comm=comm, hierarchical=2)

    optimizer = wrap(model)
    for number in range(6):
        if number == 3 and resume is not None:
            saved = model.state_dict(), optimizer.state_dict(), optimizer.memory_state_dict()
            model = net(seed=1)
            optimizer = wrap(model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
            optimizer.load_memory_state_dict(saved[2])
        optimizer.zero_grad()
        loss(model, rank, number).backward()
        optimizer.step()
    return flat(model), optimizer.exchange.stats.as_dict()


def test_anticipating_ranks_train_one_model_and_go_on_from_a_checkpoint_to_the_bit() -> None:
    runs = run_in_process(4, lambda comm: trained(comm, comm.rank))
    again = run_in_process(4, lambda comm: trained(comm, comm.rank, resume=lambda *saved: saved))
    assert all(torch.equal(model, runs[0][0]) for model, _ in (*runs, *again))


def over_mpi() -> tuple[Tensor, dict[str, Any], str]:
    """The same on real ranks; and what all are told of one rank's problem."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    model, counters = trained(MPI.COMM_WORLD, rank)
    net_ = net()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net_.parameters(), lr=0.1),
        net_.named_parameters(),
        Compression.topk(ratio=8.0, **PLAIN),
        comm=MPI.COMM_WORLD,
        hierarchical=2,
    )
    if rank == 3:
        optimizer.exchange.fail_together("it has one")
    loss(net_, rank, 0).backward()
    with pytest.raises(ConfigurationError) as told:
        optimizer.step()
    return model, counters, str(told.value)


def over_torch() -> tuple[Tensor, tuple[int, int], Tensor]:
    """Two hosts as torchrun would number them, found by themselves, by the optimizer and by DDP's hook."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    os.environ.update(GROUP_RANK=str(rank // 2), LOCAL_WORLD_SIZE="2")
    shared_memory._SMALLEST = 1  # of a small model parts as well
    plain, inside = net(), DistributedDataParallel(net())
    compression = Compression.topk(ratio=8.0, anticipate=False, **PLAIN)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(plain.parameters(), lr=0.1), plain.named_parameters(), compression
    )
    hooked = torch.optim.SGD(inside.parameters(), lr=0.1)
    hvd.ddp.register(inside, hooked, compression)
    for model, stepping in ((plain, optimizer), (inside, hooked)):
        for number in range(4):
            stepping.zero_grad()
            loss(model, rank, number).backward()
            stepping.step()
    exchange = optimizer.exchange
    assert isinstance(exchange, HierarchicalExchange)
    part, local = exchange.part.comm, exchange._local
    assert isinstance(local, SharedMemory)
    assert all(table.numel() for table in local._tables)
    return flat(plain), (part.rank, part.size), flat(inside)


def test_on_real_ranks_over_mpi4py() -> None:
    simulated = run_in_process(4, lambda comm: trained(comm, comm.rank))[0][0]
    for model, counters, told in ranks(4, over_mpi, timeout=240):
        assert torch.allclose(model, simulated, rtol=0, atol=1e-5)
        assert counters["local_bytes"] > 0
        assert "rank 3: it has one" in told


def test_on_real_ranks_under_torchrun_whose_hosts_are_found_by_themselves() -> None:
    runs = ranks(4, over_torch, launcher="torchrun", timeout=240)
    for rank, (model, part, hooked) in enumerate(runs):
        assert part == (rank // 2, 2)
        assert torch.equal(model, runs[0][0])
        assert torch.equal(hooked, model)
