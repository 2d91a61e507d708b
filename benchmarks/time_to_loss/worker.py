"""What every rank runs for one row: training until the goal's loss, or some steps for their time alone."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.accuracy.tasks import Batch, Task
from benchmarks.cluster.trainings import Training
from benchmarks.cluster.worker import come_first
from benchmarks.time_to_loss.methods import METHODS
from benchmarks.time_to_loss.tasks import GOALS, Goal

_WARMUP = 0.05  # of the dense steps, in which the learning rate rises


def main() -> None:
    """Train, and let rank 0 write what it saw."""
    options = _options()
    torch.set_num_threads(1)
    goal, method = GOALS[options.model], METHODS[options.method]
    goal = Goal(goal.task, options.steps or goal.steps, options.interval or goal.interval, goal.patience)
    training = method.start()
    come_first()
    torch.manual_seed(options.seed)
    model = goal.task.model()
    training.attach(model, goal.task.optimizer(model))
    run = _Run(training, model, goal, options.seed)
    told = run.timed(method.warmup, options.timed) if options.timed else run.until(options.target)
    if training.rank == 0:
        options.out.write_text(json.dumps(told))


class _Run:
    """One rank's training; its clock runs while it takes steps and not while it is evaluated."""

    def __init__(self, training: Training, model: nn.Module, goal: Goal, seed: int) -> None:
        self._training, self._model, self._goal = training, model, goal
        self._rates = [group["lr"] for group in training.optimizer.param_groups]
        self._batches = _batches(goal.task, training, seed)
        self._seconds, self._steps = 0.0, 0

    def until(self, target: float | None) -> dict[str, Any]:
        """Train until the loss is at most ``target``, or without one as long as dense training goes on."""
        curve: list[tuple[int, float, float, float]] = []
        longest = self._goal.steps if target is None else self._goal.longest
        while self._steps < longest:
            for _ in range(self._goal.interval):
                self._step()
            loss = self._training.gather(self._validate())[0]
            curve.append((self._steps, self._seconds, self._training.bytes_sent(), loss))
            if not math.isfinite(loss) or (target is not None and loss <= target):
                break
        return {"curve": curve}

    def timed(self, warmup: int, steps: int) -> dict[str, Any]:
        """Seconds and bytes of a step, the mean over some of them."""
        for _ in range(warmup):
            self._step()
        self._training.gather(None)
        seconds, sent = self._seconds, self._training.bytes_sent()
        for _ in range(steps):
            self._step()
        sent = self._training.bytes_sent() - sent
        return {"seconds_step": (self._seconds - seconds) / steps, "bytes_step": sent / steps}

    def _step(self) -> None:
        factor = min(1.0, (self._steps + 1) / max(1.0, _WARMUP * self._goal.steps))
        for group, rate in zip(self._training.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        batch = next(self._batches)
        begin = time.perf_counter()
        self._training.step(*batch)
        self._seconds += time.perf_counter() - begin
        self._steps += 1

    def _validate(self) -> float:
        with getattr(self._training.optimizer, "average_model", nullcontext)():
            self._model.eval()
            inputs, targets = self._goal.task.held_out()
            with torch.no_grad():
                loss = float(F.cross_entropy(self._model(inputs), targets))
            self._model.train()
        return loss


def _batches(task: Task, training: Training, seed: int) -> Iterator[Batch]:
    """This rank's share of every batch; all ranks draw the same ones."""
    generator = torch.Generator().manual_seed(seed + 1)
    while True:
        inputs, targets = task.batch(generator, training.size * task.batch_size)
        yield inputs.chunk(training.size)[training.rank], targets.chunk(training.size)[training.rank]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(GOALS), required=True)
    parser.add_argument("--method", choices=tuple(METHODS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, help="loss to reach; without it, train as long as dense training")
    parser.add_argument("--timed", type=int, default=0, help="only take so many steps, for their time")
    parser.add_argument("--steps", type=int, default=0, help="of dense training, in place of the model's own")
    parser.add_argument("--interval", type=int, default=0, help="steps between evaluations, likewise")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
