"""One training with many ranks in one process: a thread, a model and an optimizer each, and the real exchange."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.methods import Wrap
from benchmarks.accuracy.tasks import Batch, Task
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup

DIVERGED = 50.0
MOMENTS = 12
"""How often a run is evaluated."""


@dataclass
class Outcome:
    """How a training went: validation losses by step, and the bytes one rank sent until then."""

    losses: list[tuple[int, int, float]] = field(default_factory=list)
    diverged: bool = False

    @property
    def final_loss(self) -> float:
        """The last validation loss."""
        return self.losses[-1][2]


def train(task: Task, wrap: Wrap, *, ranks: int, seed: int, steps: int, lr_scale: float = 1.0) -> Outcome:
    """Train from one start on ``ranks`` batches a step; what rank 0 saw, of the average model where models differ.

    The learning rate is the task's, tuned for dense training, times ``lr_scale``.
    """
    start, batches = begin(task, ranks, seed, steps)
    models = [copy.deepcopy(start) for _ in range(ranks)]
    scaled = at_scale(wrap, lr_scale)
    return InProcessGroup(ranks).run(lambda comm: train_rank(task, scaled, models[comm.rank], comm, batches))[0]


def at_scale(wrap: Wrap, lr_scale: float) -> Wrap:
    """The same method over an optimizer of another learning rate."""

    def wrap_scaled(optimizer: torch.optim.Optimizer, model: nn.Module, comm: Communicator) -> Any:
        for group in optimizer.param_groups:
            group["lr"] *= lr_scale
        return wrap(optimizer, model, comm)

    return wrap_scaled


def begin(task: Task, ranks: int, seed: int, steps: int) -> tuple[nn.Module, list[Batch]]:
    """The model before the first step, and the batches of all ranks for every step."""
    torch.manual_seed(seed)
    start, generator = task.model(), torch.Generator().manual_seed(seed + 1)
    return start, [task.batch(generator, ranks * task.batch_size) for _ in range(steps)]


def train_rank(task: Task, wrap: Wrap, model: nn.Module, comm: Communicator, batches: list[Batch]) -> Outcome:
    """One rank's part of a training, on its share of every batch."""
    steps = len(batches)
    optimizer = wrap(task.optimizer(model), model, comm)
    schedule = learning_rate(optimizer, steps)
    outcome, before = Outcome(), comm.bytes_sent
    for step, (inputs, targets) in enumerate(batches):
        _step(task, optimizer, model, inputs.chunk(comm.size)[comm.rank], targets.chunk(comm.size)[comm.rank])
        schedule.step()
        if (step + 1) % max(1, steps // MOMENTS) == 0 or step == steps - 1:
            sent = comm.bytes_sent - before
            loss = _validate(model, task, optimizer, comm)
            outcome.losses.append((step + 1, sent, loss))
            outcome.diverged = any(comm.allgather_object(not loss < DIVERGED, "diverged"))
            if outcome.diverged:
                break
            before = comm.bytes_sent - sent  # what the evaluation sent is no part of the training
    return outcome


def learning_rate(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """A warm-up over a twentieth of the steps, then half a cosine, down to a tenth."""
    warmup = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )


def _step(task: Task, optimizer: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    if task.clip is None:
        optimizer.step()
    elif hasattr(optimizer, "synchronize"):
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        with optimizer.skip_synchronize():
            optimizer.step()
    else:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()


def _validate(model: nn.Module, task: Task, optimizer: Any, comm: Communicator) -> float:
    """The loss on rank 0, whose outcome counts; zero elsewhere."""
    with getattr(optimizer, "average_model", nullcontext)():
        if comm.rank > 0:
            return 0.0
        model.eval()
        inputs, targets = task.held_out()
        with torch.no_grad():
            loss = float(F.cross_entropy(model(inputs), targets))
        model.train()
    return loss if math.isfinite(loss) else math.inf
