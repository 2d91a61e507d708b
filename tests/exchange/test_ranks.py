"""The exchange on real ranks: equal bits everywhere, whoever carries the messages, and nothing lost on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch import Compression
from hvd_sketch.comm import Communicator, as_communicator, default_communicator
from hvd_sketch.memory import Momentum
from tests.support import known_answers
from tests.support.ranks import Launcher, in_turn, ranks, several
from tests.support.simulation import drive, heavy_tailed, lost, rounding, simulate
from tests.support.training import COMPRESSED, flat, loss, net, train

PLAIN: dict[str, Any] = {"ratio": 10.0, "clip_norm": None}
COMPRESSORS: dict[str, Any] = {
    "sketch": partial(Compression.sketch, warmup_steps=2, **PLAIN),
    "single precision": partial(Compression.sketch, half=False, oversampling=2.0, warmup_steps=0, **PLAIN),
    "buckets": partial(Compression.sketch, buckets=2, warmup_steps=2, **PLAIN),
    "in turn": partial(Compression.sketch, in_turn=0.75, oversampling=2.0, warmup_steps=0, **PLAIN),
    "sharded": partial(Compression.sharded, buckets=3, dense_below=1024, warmup_steps=2, **PLAIN),
    "topk": partial(Compression.topk, warmup_steps=2, **PLAIN),
}
STEPS, TOTAL = 8, 5470
LARGE = {"w.weight": (500, 400), "w.bias": (400,)}


def mpi_world() -> Any:
    from mpi4py import MPI

    return MPI.COMM_WORLD


class Seen(NamedTuple):
    """What one rank saw of one exchange."""

    updates: Tensor
    residual: Tensor
    ratio: float  # of the last steps
    captured: float


def see(comm: Communicator, name: str) -> Seen:
    gradients = heavy_tailed(comm.size, STEPS, TOTAL)[comm.rank]
    updates, exchange = drive(comm, COMPRESSORS[name](), gradients)
    bytes_before: list[int] = []

    def note(exchange: Any, number: int) -> None:
        if number == 4:
            bytes_before.extend((exchange.stats.dense_bytes, exchange.stats.bytes_sent))

    large = heavy_tailed(comm.size, 6, 200_400)[comm.rank]
    stats = drive(comm, COMPRESSORS[name](), large, LARGE, before_step=note).exchange.stats
    ratio = (stats.dense_bytes - bytes_before[0]) / (stats.bytes_sent - bytes_before[1])
    return Seen(updates, exchange.memory.residual, ratio, stats.captured_energy)


OnTwoRanks = dict[str, list[Any]]


def exchanges(use_mpi4py: bool) -> dict[str, Seen]:
    hvd.init()
    comm = as_communicator(mpi_world()) if use_mpi4py else default_communicator()
    return {name: see(comm, name) for name in COMPRESSORS}


@pytest.mark.parametrize(("size", "launcher"), [(2, "mpirun"), (2, "horovodrun-gloo"), (4, "mpirun")])
def test_nothing_is_lost_and_every_bit_is_equal(size: int, launcher: Launcher) -> None:
    use_mpi4py = [(False,), (True,)] if launcher == "mpirun" else [(False,)]
    for results in zip(*ranks(size, several, exchanges, use_mpi4py, launcher=launcher), strict=True):
        check_exchanges(results)


def check_exchanges(results: Sequence[dict[str, Seen]]) -> None:
    """What every rank saw, over one communicator."""
    size = len(results)
    gradients = heavy_tailed(size, STEPS, TOTAL)
    for name in COMPRESSORS:
        seen = [result[name] for result in results]
        assert all(torch.equal(one.updates, seen[0].updates) for one in seen)
        missing = lost(gradients, seen[0].updates, [one.residual for one in seen])
        assert (missing <= rounding(gradients)).all()
        assert seen[0].ratio == pytest.approx(10.0, rel=0.02)
        assert name == "topk" or 0.0 < seen[0].captured < 1.0
        if size == 2:  # a sum of two does not depend on the order: the simulation must agree to the bit
            for one, run in zip(seen, simulate(COMPRESSORS[name](), gradients), strict=True):
                assert torch.equal(one.updates, run.updates)
                assert torch.equal(one.residual, run.residual)


def by_every_road(make: Any, momentum: float) -> list[Tensor]:
    """The parameters after training by our optimizer on Horovod, by stock Horovod, and by ours on mpi4py."""
    import horovod.torch as stock_hvd

    ends = []
    for road in ("own", "stock", "mpi4py"):
        model = net()
        inner = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
        module: Any = stock_hvd if road == "stock" else hvd
        keywords = {"comm": mpi_world()} if road == "mpi4py" else {}
        optimizer = module.DistributedOptimizer(inner, model.named_parameters(), make(), **keywords)
        ends.append(train(optimizer, model, STEPS, hvd.rank()))
    return ends


def by_name(size: int, k: int, make: Any) -> Tensor:
    """The same training by a loop that knows parameters by their names, and sums and selects exactly."""
    model = net()
    optimizer = make(model.parameters())
    residuals = [{name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(size)]
    for step in range(STEPS):
        for rank, residual in enumerate(residuals):
            model.zero_grad()
            loss(model, rank, step).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                residual[name] += parameter.grad
        sums = {name: torch.stack([residual[name] for residual in residuals]).sum(0) for name in residuals[0]}
        weights = torch.cat([sums[name].abs().flatten() for name in sums if name.endswith("weight")])
        threshold = float(weights.topk(k).values[-1])
        for name, parameter in model.named_parameters():
            sent = sums[name].abs() >= (threshold if name.endswith("weight") else 0.0)
            parameter.grad = sums[name] * sent / size
            for residual in residuals:
                residual[name] *= ~sent
        optimizer.step()
    return flat(model)


def roads() -> tuple[dict[str, list[Tensor]], Tensor]:
    hvd.init()
    ends = {name: by_every_road(make, 0.9) for name, make in COMPRESSORS.items()}
    ends["momentum correction"] = by_every_road(partial(COMPRESSORS["sketch"], momentum=Momentum(0.9)), 0.0)
    model = net()
    exact = Compression.sketch(rows=7, cols=54 * COMPRESSED, k=200, half=False, clip_norm=None)
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), exact)
    return ends, train(optimizer, model, STEPS, hvd.rank())


def test_every_road_leads_to_the_same_parameters(on_two_ranks: OnTwoRanks) -> None:
    """The fifteen, item 2: stock Horovod as installed, our own optimizer and mpi4py, bit for bit."""
    results = on_two_ranks["roads"]
    for name, ends in results[0][0].items():
        for other in (*ends, *results[1][0][name]):
            assert torch.equal(other, ends[0]), name
    expected = by_name(2, 200, lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9))
    for _, end in results:
        torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-6)


class Weights(nn.Module):
    """The two weights of the known answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1))


def known_answer(k: int, momentum: float, keywords: dict[str, Any]) -> Tensor:
    model, seen = Weights(), []
    compressor = Compression.sketch(cols=2, k=k, half=False, dense_below=1, clip_norm=None)
    inner = torch.optim.SGD(model.parameters(), known_answers.LEARNING_RATE, momentum=momentum)
    optimizer = hvd.DistributedOptimizer(
        inner, model.named_parameters(), compressor, op=hvd.Sum, momentum_correction=momentum > 0, **keywords
    )
    for _ in range(3):
        optimizer.zero_grad()
        known_answers.loss(model.weight[:, 0], hvd.rank(), hvd.size()).backward()
        optimizer.step()
        seen.append(model.weight.detach()[:, 0].clone())
    return torch.stack(seen)


def known_answers_on_ranks() -> list[list[Tensor]]:
    hvd.init()
    roads: list[dict[str, Any]] = [{}, {"comm": mpi_world()}]
    return [[known_answer(k, momentum, road) for road in roads] for k, momentum in known_answers.WEIGHTS]


def test_known_answers_on_two_ranks(on_two_ranks: OnTwoRanks) -> None:
    for result in on_two_ranks["known_answers_on_ranks"]:
        for ends, expected in zip(result, known_answers.WEIGHTS.values(), strict=True):
            for end in ends:
                torch.testing.assert_close(end, torch.tensor(expected), rtol=0, atol=1e-6)


def dense_and_sparse(settings: dict[str, Any], op: int, *, correction: bool) -> tuple[Tensor, Tensor]:
    """The parameters after training with everything sent, and with Horovod's own uncompressed optimizer."""
    import horovod.torch as stock_hvd

    ends = []
    everything = Compression.sketch(cols=COMPRESSED, k=COMPRESSED, half=False, clip_norm=None)
    for compression in (everything, Compression.none):
        model = net()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.05, **settings),
            model.named_parameters(),
            compression,
            op=op,
            momentum_correction=correction,
            momentum_masking=False,
        )
        for step in range(6):  # the first layer has no gradient on rank 0 in odd steps
            optimizer.zero_grad()
            target = model if step % 2 == 0 or hvd.rank() else model[2]
            target(torch.ones(3, 30 if target is model else 60) * (1 + hvd.rank())).square().mean().backward()
            optimizer.step()
        ends.append(flat(model))
    assert op in (stock_hvd.Average, stock_hvd.Sum)
    return ends[0], ends[1]


SETTINGS: list[dict[str, Any]] = [
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


def dense_and_sparse_on_ranks() -> list[tuple[Tensor, Tensor]]:
    hvd.init()
    return [
        dense_and_sparse(settings, op, correction=correction)
        for settings in SETTINGS
        for op in (hvd.Average, hvd.Sum)
        for correction in (True, False)
    ]


def test_sending_everything_is_horovods_own_training(on_two_ranks: OnTwoRanks) -> None:
    """The fifteen, item 12: with Average and Sum, momentum before and after, and gradients missing on one rank."""
    results = on_two_ranks["dense_and_sparse_on_ranks"]
    for (sparse, dense), (other, _) in zip(*results, strict=True):
        assert torch.equal(sparse, other)
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


def late_on_rank_0() -> tuple[int, int]:
    """Rank 1 is through at once, and Horovod, which started MPI, then ends it on both."""
    hvd.init()
    from mpi4py import MPI

    comm = as_communicator(MPI.COMM_WORLD)
    comm.allreduce(torch.ones(1), "once")
    deadline = time.monotonic() + 60
    while hvd.rank() == 0 and not MPI.Is_finalized() and time.monotonic() < deadline:
        time.sleep(0.01)
    return comm.rank, comm.size


@pytest.fixture(scope="module")
def on_two_ranks() -> OnTwoRanks:
    """What both ranks have to tell, by body; the last one ends them."""
    bodies: list[Callable[[], Any]] = [roads, known_answers_on_ranks, dense_and_sparse_on_ranks, late_on_rank_0]
    told = zip(*ranks(2, in_turn, bodies, timeout=240), strict=True)
    return {body.__name__: list(each) for body, each in zip(bodies, told, strict=True)}


def test_a_rank_may_still_ask_who_it_is_when_horovod_has_ended_mpi(on_two_ranks: OnTwoRanks) -> None:
    assert on_two_ranks["late_on_rank_0"] == [(0, 2), (1, 2)]
