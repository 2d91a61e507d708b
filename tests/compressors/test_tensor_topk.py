"""Top-k of every tensor by itself: what each sends, that nothing is lost, and that Accordion sets each one's level."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_sketch import Compression, SingleProcess, wire
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors.tensor_topk import TensorTopK
from hvd_sketch.schedules.accordion import Accordion
from tests.support import training
from tests.support.compressors import PLAIN
from tests.support.ranks import ranks
from tests.support.simulation import heavy_tailed, lost, make, rounding, simulate, step

PARTS = {"a.weight": slice(0, 2400), "b.weight": slice(2400, 5400)}
TOTAL, EPOCH = 5470, 3


def sent(update: torch.Tensor) -> list[int]:
    return [int(update[part].count_nonzero()) for part in PARTS.values()]


@pytest.mark.parametrize("ratio", [1.0, 7.0, 3000.0])
def test_every_tensor_sends_its_own_largest(ratio: float) -> None:
    exchange = make(TensorTopK(schedule=lambda step: ratio, **PLAIN), SingleProcess())
    gradient = heavy_tailed(TOTAL)
    gradient[PARTS["b.weight"]] *= 1e-6
    update = step(exchange, gradient)
    for part in PARTS.values():
        k = max(1, int((part.stop - part.start) / ratio))
        largest = gradient[part].abs().topk(k).indices
        assert torch.equal(update[part][largest], gradient[part][largest])
        assert int(update[part].count_nonzero()) == k
    assert torch.equal(update[5400:], gradient[5400:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nothing_is_lost(size: int) -> None:
    gradients = heavy_tailed(size, 12, TOTAL)
    runs = simulate(TensorTopK(ratio=10.0, warmup_steps=4, clip_norm=None), gradients)
    assert all(torch.equal(run.updates, runs[0].updates) for run in runs)
    gone = lost(gradients, runs[0].updates, [run.residual for run in runs])
    assert (gone <= rounding(gradients)).all()


def test_one_tensor_is_the_ordinary_exchange() -> None:
    shapes = {"only.weight": (40, 60)}
    gradients = heavy_tailed(3, 8, 2400)
    ordinary = simulate(Compression.topk(ratio=20.0, half=False, **PLAIN), gradients, shapes)
    # the ordinary one pays for its header as well, and for a seal
    found = simulate(
        TensorTopK(schedule=lambda step: 2400 / (2400 / 20.0 - wire.HEADER - 2), **PLAIN), gradients, shapes
    )
    assert torch.equal(ordinary[0].updates, found[0].updates)


def test_a_bad_number_on_one_rank_spares_every_memory() -> None:
    gradients = heavy_tailed(2, 4, TOTAL)
    gradients[1, 3, 5] = float("inf")
    whole, before = (simulate(TensorTopK(**PLAIN), gradients[:, :steps]) for steps in (4, 3))
    for one, other in zip(whole, before, strict=True):
        assert one.updates[3].isnan().all()
        assert torch.equal(one.residual, other.residual)


def test_accordion_sets_each_tensors_level() -> None:
    """``a.weight`` changes in the second epoch and ``b.weight`` does not, in the third both are calm."""

    def body(comm: Communicator) -> list[list[int]]:
        exchange = make(TensorTopK(schedule=Accordion(2.0, 20.0, EPOCH, every=1), **PLAIN), comm)
        gradients = heavy_tailed(TOTAL, seed=comm.rank).repeat(4 * EPOCH, 1)
        gradients[EPOCH:, PARTS["a.weight"]] *= 3.0
        seen = []
        for gradient in gradients:
            before = exchange.memory.residual + gradient
            step(exchange, gradient)
            after = exchange.memory.residual
            seen.append([int((before[part] != after[part]).sum()) for part in PARTS.values()])
        return seen

    for seen in run_in_process(2, body):
        low, changed, high = [600, 750], [600, 75], [60, 75]
        assert seen == [low] * 2 * EPOCH + [changed] * EPOCH + [high] * EPOCH


def real() -> tuple[torch.Tensor, list[list[float]], list[int]]:
    """On a real rank: the model at the end, every step's levels, and its bytes."""
    import horovod.torch as hvd

    import hvd_sketch

    hvd.init()
    accordion = Accordion(2.0, 20.0, epoch_steps=4, every=1)
    model = training.net()
    optimizer: Any = hvd_sketch.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.02),
        model.named_parameters(),
        TensorTopK(schedule=accordion),
        error_feedback=None,
    )
    levels, sent_bytes = [], []
    for number in range(16):
        levels.append(list(accordion.ratios) or [2.0, 2.0])
        optimizer.zero_grad()
        training.loss(model, hvd.rank(), number % 4).backward()
        optimizer.step()
        sent_bytes.append(optimizer.exchange.stats.bytes_sent)
    return training.flat(model), levels, sent_bytes


def test_real_ranks_switch_each_tensor_together() -> None:
    (model, levels, sent_bytes), other = ranks(2, real)
    assert torch.equal(model, other[0])
    assert (levels, sent_bytes) == other[1:]
    assert levels[:8] == [[2.0, 2.0]] * 8
    assert levels[-1] == [20.0, 20.0]
    last_high, last_low = sent_bytes[-2] - sent_bytes[-3], sent_bytes[6] - sent_bytes[5]
    assert last_low - last_high == 8 * (int(1800 / 4) + int(2400 / 4) - int(1800 / 40) - int(2400 / 40))
