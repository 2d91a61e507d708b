"""Every method against misleading errors is saved, resumed to the bit, and taken to another number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch import Compression, StepAhead
from hvd_sketch.compressors.tensor_topk import TensorTopK
from hvd_sketch.methods.local.cser import CSER
from hvd_sketch.methods.local.local_sgd import LocalSGD
from hvd_sketch.methods.local.overlap import OverlapLocalSGD
from hvd_sketch.schedules.accordion import Accordion
from hvd_sketch.schedules.accordion_batch import AccordionBatch
from hvd_sketch.schedules.base import AdaptiveSchedule
from hvd_sketch.schedules.energy_target import EnergyTarget
from tests.support.ranks import ranks
from tests.support.training import flat, loss, net

SAVED_AFTER, STEPS, MORE = 7, 14, 40
PLAIN: dict[str, Any] = {"warmup_steps": 0, "clip_norm": None, "dense_below": 100}
SHARDED, STRIDE = Compression.sharded(ratio=10.0, half=False, **PLAIN), Compression.stride(ratio=10.0, **PLAIN)


def feedback(compressor: Any, settings: StepAhead | None = None) -> Callable[[Any, nn.Module], Any]:
    return lambda inner, model: hvd.DistributedOptimizer(
        inner, model.named_parameters(), compressor, error_feedback=settings
    )


def methods() -> dict[str, Callable[[Any, nn.Module], Any]]:
    """One of each, with their schedules; the sharded exchange is double compression."""
    accordion, own_levels, together = (Accordion(2.0, 20.0, 3, every=1) for _ in range(3))
    return {
        "step ahead": feedback(SHARDED, StepAhead(1.0, 3)),
        "step ahead by a part, with accordion": feedback(Compression.topk(schedule=accordion), StepAhead(0.5, 0)),
        "accordion": feedback(TensorTopK(schedule=own_levels)),
        "accordion, one budget": feedback(Compression.sketch(schedule=together)),
        "accordion for batches": feedback(Compression.topk(schedule=AccordionBatch(1, 2, 10.0, 3, every=1))),
        "energy": feedback(Compression.sharded(schedule=EnergyTarget(0.4, every=2))),
        "local SGD, kept": lambda inner, model: LocalSGD(inner, model, compression=SHARDED, period=3),
        "local SGD, reset": lambda inner, model: LocalSGD(
            inner, model, compression=SHARDED, period=3, momentum_sync="reset", outer_momentum=0.3, nesterov=False
        ),
        "local SGD, averaged": lambda inner, model: LocalSGD(
            inner, model, compression=SHARDED, period=3, momentum_sync="average", outer_momentum=0.3
        ),
        "overlap": lambda inner, model: OverlapLocalSGD(inner, model, period=3),
        "CSER": lambda inner, model: CSER(inner, model, gradients=STRIDE, errors=SHARDED, period=3),
        "CSER-PL": lambda inner, model: CSER(inner, model, gradients=None, errors=STRIDE, period=3),
    }


def train(optimizer: Any, model: nn.Module, steps: range) -> Tensor:
    for step in steps:
        optimizer.zero_grad()
        with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
            for turn in range(passes(optimizer)):
                loss(model, hvd.rank(), step % 5 + 10 * turn).backward()
        optimizer.step()
    return flat(model)


def passes(optimizer: Any) -> int:
    """What `AccordionBatch` asks for, if it is there."""
    batches = [schedule for schedule in schedules(optimizer) if isinstance(schedule, AccordionBatch)]
    return batches[0].begin_step(optimizer) if batches else 1


def fresh(make: Callable[[Any, nn.Module], Any], seed: int = 0) -> tuple[nn.Module, Any]:
    model = net(seed)
    return model, make(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), model)


def save_on_the_way(folder: Path) -> dict[str, Tensor]:
    """Train to the end; on the way every rank saves, and rank 0 once more after a flush."""
    hvd.init()
    ends = {}
    for name, make in methods().items():
        model, optimizer = fresh(make)
        train(optimizer, model, range(SAVED_AFTER))
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "memory": optimizer.memory_state_dict(),
        }
        torch.save(state, folder / f"{name}.{hvd.rank()}.pt")
        ends[name] = train(optimizer, model, range(SAVED_AFTER, STEPS))
        flush(optimizer, model, STEPS)
        if hvd.rank() == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedules": [schedule.state_dict() for schedule in schedules(optimizer)],
            }
            torch.save(state, folder / f"{name}.flushed.pt")
    return ends


def schedules(optimizer: Any) -> list[AdaptiveSchedule]:
    """The adaptive ones that follow the optimizer's exchange."""
    return list(optimizer.exchange.observers) if hasattr(optimizer, "exchange") else []


def flush(optimizer: Any, model: nn.Module, step: int) -> Tensor:
    optimizer.flush()
    return flat(model) if hasattr(optimizer, "average_model") else train(optimizer, model, range(step, step + 1))


def resume(folder: Path) -> dict[str, Tensor]:
    hvd.init()
    ends = {}
    for name, make in methods().items():
        saved = torch.load(folder / f"{name}.{hvd.rank()}.pt", weights_only=True)
        model, optimizer = fresh(make, seed=9)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.load_memory_state_dict(saved["memory"])
        ends[name] = train(optimizer, model, range(SAVED_AFTER, STEPS))
    return ends


def resume_on_others(folder: Path) -> dict[str, tuple[float, float, Tensor]]:
    """The loss before and after more training, and the model after it; every rank loads the same file."""
    hvd.init()
    told = {}
    for name, make in methods().items():
        saved = torch.load(folder / f"{name}.flushed.pt", weights_only=True)
        model, optimizer = fresh(make, seed=9)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for schedule, state in zip(schedules(optimizer), saved["schedules"], strict=True):
            schedule.load_state_dict(state)
            decided = {"critical", "last", "ratio"} & state.keys()
            assert decided
            assert all(schedule.state_dict()[key] == state[key] for key in decided)
        before = fit(model)
        train(optimizer, model, range(STEPS, MORE))
        end = flush(optimizer, model, MORE)
        told[name] = before, fit(model), end
    return told


@torch.no_grad()
def fit(model: nn.Module) -> float:
    """The mean loss of what all ranks train on."""
    return sum(float(loss(model, rank, step)) for rank in range(3) for step in range(5)) / 15


def test_it_resumes_to_the_bit_and_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    whole = ranks(2, save_on_the_way, tmp_path, timeout=280)
    resumed = ranks(2, resume, tmp_path, timeout=280)
    for rank, ends in enumerate(whole):
        for name, end in ends.items():
            assert torch.equal(end, resumed[rank][name]), name
    seen = ranks(3, resume_on_others, tmp_path, timeout=280)
    for told in seen:
        for name, (before, after, end) in told.items():
            assert after < before, name
            assert torch.equal(end, seen[0][name][2]), name
