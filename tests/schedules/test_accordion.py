"""Adaptive ratios: what they decide, that all ranks decide alike, and that they go on where they were saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_sketch
from hvd_sketch import Compression, ConfigurationError, RankMismatchError
from hvd_sketch.comm import Communicator, SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors.tensor_topk import TensorTopK
from hvd_sketch.schedules.accordion import Accordion
from hvd_sketch.schedules.accordion_batch import AccordionBatch
from hvd_sketch.schedules.base import AdaptiveSchedule
from hvd_sketch.schedules.energy_target import EnergyTarget
from tests.support import training
from tests.support.ranks import ranks
from tests.support.simulation import SHAPES, heavy_tailed, make, step

TOTAL = 5470
EPOCH = 3


def ratios(schedule: AdaptiveSchedule, comm: Communicator, gradients: Tensor) -> list[float]:
    """The ratio after every step of an exchange of the given gradients, (steps, total)."""
    exchange = make(Compression.topk(schedule=schedule, clip_norm=None), comm)
    seen = []
    for gradient in gradients:
        step(exchange, gradient)
        seen.append(schedule(exchange.step))
    return seen


def epochs(*scales: float, seed: int = 0) -> Tensor:
    """Gradients of one direction, of these sizes in these epochs."""
    direction = heavy_tailed(TOTAL, seed=seed)
    return torch.stack([scale * direction for scale in scales for _ in range(EPOCH)])


def test_it_starts_low_goes_high_when_calm_and_low_again_when_the_gradient_changes() -> None:
    accordion = Accordion(low=2.0, high=20.0, epoch_steps=EPOCH, every=1)
    seen = ratios(accordion, SingleProcess(), epochs(1.0, 1.1, 1.0, 0.4, 0.4))
    at_end = seen[EPOCH - 1 :: EPOCH]
    assert at_end == [pytest.approx(ratio) for ratio in (2.0, 20.0, 20.0, 2.0, 20.0)]
    assert seen[:EPOCH] == [2.0] * EPOCH


def test_detection_is_rare_and_looks_at_whole_epochs() -> None:
    accordion = Accordion(low=2.0, high=20.0, epoch_steps=EPOCH, every=2)
    seen = ratios(accordion, SingleProcess(), epochs(1.0, 9.0, 1.0, 9.0, 9.0))
    assert seen[EPOCH - 1 :: EPOCH] == [pytest.approx(ratio) for ratio in (2.0, 2.0, 20.0, 20.0, 2.0)]


def test_a_falling_learning_rate_makes_it_low_until_the_next_detection() -> None:
    rates = iter([0.1] * 7 + [0.01] * 20)
    accordion = Accordion(low=2.0, high=20.0, epoch_steps=EPOCH, every=1, learning_rate=lambda: next(rates))
    seen = ratios(accordion, SingleProcess(), epochs(1.0, 1.0, 1.0, 1.0))
    assert seen == [pytest.approx(ratio) for ratio in [2.0] * 5 + [20.0] * 2 + [2.0] + [20.0] * 4]


def test_each_tensor_has_its_own_level() -> None:
    """``a.weight`` changes and ``b.weight`` does not: the budget is that of both levels together."""
    accordion = Accordion(low=2.0, high=20.0, epoch_steps=EPOCH, every=1)
    gradients = epochs(1.0, 1.0)
    gradients[EPOCH:, :2400] *= 3.0
    seen = ratios(accordion, SingleProcess(), gradients)
    assert accordion.critical == [True, False]
    assert seen[-1] == pytest.approx(5400 / (2400 / 2.0 + 3000 / 20.0))
    assert [name for name in sorted(SHAPES) if "weight" in name] == ["a.weight", "b.weight"]


def test_all_ranks_switch_together_though_their_gradients_differ() -> None:
    """Rank 0 alone would see no change, the others would."""

    def body(comm: Communicator) -> list[float]:
        scales = (1.0, 1.0, 1.0) if comm.rank == 0 else (1.0, 4.0, 4.0)
        return ratios(Accordion(2.0, 20.0, EPOCH, every=1), comm, epochs(*scales, seed=comm.rank))

    seen = run_in_process(3, body)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][2 * EPOCH - 1] < 20.0
    assert seen[0][-1] == pytest.approx(20.0)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    """An epoch then lasts a step longer."""

    def body(comm: Communicator, spoilt: int) -> list[float]:
        gradients = epochs(1.0, 1.1, 0.4).repeat_interleave(torch.tensor([1] * 4 + [1 + spoilt] + [1] * 4), dim=0)
        if spoilt and comm.rank == 1:
            gradients[4, 7] = float("nan")
        return ratios(Accordion(2.0, 20.0, EPOCH, every=1), comm, gradients)

    first, second = run_in_process(2, lambda comm: body(comm, 1))
    assert first == second
    assert first[:4] + first[5:] == run_in_process(2, lambda comm: body(comm, 0))[0]
    assert pytest.approx(20.0) in first


def test_ranks_that_differ_in_it_are_told() -> None:
    def body(comm: Communicator) -> list[float]:
        return ratios(Accordion(2.0, 20.0 + comm.rank, EPOCH), comm, epochs(1.0))

    with pytest.raises(RankMismatchError, match="settings"):
        run_in_process(2, body)


@pytest.mark.parametrize(
    "make_schedule",
    [lambda: Accordion(2.0, 20.0, EPOCH, every=1), lambda: EnergyTarget(0.3, low=2.0, high=50.0, every=2)],
    ids=["accordion", "energy"],
)
@pytest.mark.parametrize("compress", [Compression.topk, Compression.sketch, TensorTopK])
def test_it_goes_on_to_the_bit_where_it_was_saved(make_schedule: Any, compress: Any) -> None:
    gradients = torch.cat([epochs(1.0, 1.0, 3.0), heavy_tailed(6, TOTAL)])

    def fresh() -> Any:
        return make(compress(schedule=make_schedule(), clip_norm=None), SingleProcess())

    whole = fresh()
    expected = [step(whole, gradient) for gradient in gradients]
    for cut in (2, 4, 7):
        first, second = fresh(), fresh()
        for gradient in gradients[:cut]:
            step(first, gradient)
        second.load_state_dict(first.state_dict())
        for gradient, update in zip(gradients[cut:], expected[cut:], strict=True):
            assert torch.equal(step(second, gradient), update)
    with pytest.raises(ConfigurationError, match="observers has 1 entries, here 0.*schedule"):
        make(Compression.topk(), SingleProcess()).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("member", ["topk", "sketch", "sharded"])
def test_the_energy_comes_near_its_target(member: str) -> None:
    def body(comm: Communicator) -> tuple[list[float], list[float]]:
        schedule = EnergyTarget(0.6, low=2.0, high=40.0, every=4)
        exchange = make(getattr(Compression, member)(schedule=schedule, clip_norm=None), comm)
        seen, energies = [], []
        for gradient in heavy_tailed(120, TOTAL, seed=comm.rank):
            step(exchange, gradient)
            seen.append(schedule(exchange.step))
            energies.append(exchange.stats.captured_energy)
        return seen, energies

    results = run_in_process(2, body)
    assert results[0][0] == results[1][0]
    assert 2.0 < results[0][0][-1] < 40.0
    energies = [sum(result[1][-40:]) / 40 for result in results]
    assert sum(energies) / 2 == pytest.approx(0.6, rel=0.25)


def test_an_exchange_that_does_not_tell_its_energy_is_refused() -> None:
    schedule = EnergyTarget(0.4, every=1)
    exchange = make(Compression.topk(schedule=schedule), SingleProcess())
    exchange.stats.captured_energy = float("nan")
    with pytest.raises(ConfigurationError, match="captured energy"):
        schedule.observe(exchange)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3.0, 2.0, 10), "low <= high"),
        ((0.5, 2.0, 10), "1 <= low"),
        ((2.0, 3.0, 0), "epoch_steps"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Accordion(*arguments)


@pytest.mark.parametrize("settings", [{"target": 0.0}, {"target": 0.5, "low": 0.0}, {"target": 0.5, "gain": 2.0}])
def test_energy_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="EnergyTarget"):
        EnergyTarget(**settings)  # type: ignore[arg-type]


def test_one_schedule_follows_one_optimizer() -> None:
    compressor = Compression.topk(schedule=Accordion(2.0, 20.0, EPOCH))
    make(compressor, SingleProcess())
    with pytest.raises(ConfigurationError, match="make one for each optimizer"):
        make(compressor, SingleProcess())


def batches(steps: int) -> tuple[list[int], list[float]]:
    """On a real rank: the passes of every step, and the ratio of another optimizer that follows an Accordion."""
    import horovod.torch as hvd

    hvd.init()
    rate = [0.1]
    regimes = AccordionBatch(1, 4, 10.0, 4, every=1, learning_rate=lambda: rate[0])
    accordion = Accordion(2.0, 10.0, epoch_steps=4, every=1)

    def wrapped(model: torch.nn.Module, compressor: Any) -> Any:
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        return hvd_sketch.DistributedOptimizer(sgd, model.named_parameters(), compressor)

    model, other = training.net(), training.net()
    batched = wrapped(model, Compression.topk(schedule=regimes, clip_norm=None))
    sparse = wrapped(other, Compression.sketch(schedule=accordion, clip_norm=None))
    passes, ratios = [], []
    for number in range(steps):
        rate[0] = 0.1 if number < 14 else 0.01
        passes.append(regimes.begin_step(batched))
        for turn in range(passes[-1]):
            training.loss(model, hvd.rank(), (number + turn) % 4).backward()
        batched.step()
        batched.zero_grad()
        training.loss(other, hvd.rank(), number % 4).backward()
        sparse.step()
        sparse.zero_grad()
        ratios.append(accordion(number + 1))
    return passes, ratios


def test_real_ranks_switch_together() -> None:
    results = ranks(2, batches, 20)
    assert results[0] == results[1]
    passes, ratios = results[0]
    assert passes == [1] * 8 + [4] * 7 + [1] * 4 + [4]
    assert ratios[:7] == [2.0] * 7
    assert max(ratios) == pytest.approx(10.0)
