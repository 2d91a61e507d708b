"""What is trained: the character transformer and a CNN on digits, in sizes from a test's to a real one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.accuracy.tasks import TASKS, Batch, Task, Transformer
from benchmarks.cluster.models import ConvNet


@dataclass(frozen=True)
class Goal:
    """A training and how long dense training goes on, whose lowest loss is what all others have to reach.

    Attributes:
        steps: of dense training.
        patience: how many times as many steps another method may take.
        interval: steps between two evaluations.
    """

    task: Task
    steps: int
    interval: int
    patience: float = 3.0

    @property
    def longest(self) -> int:
        """The most steps that a method may take."""
        return int(self.patience * self.steps)


def _transformer(width: int, layers: int, rate: float) -> Task:
    return replace(
        TASKS["transformer-adamw"],
        model=lambda: Transformer(width, layers),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=rate),
    )


def _digits(width: int, rate: float) -> Task:
    """The digits, in three equal colours."""
    plain = TASKS["cnn-batchnorm"]

    def colored(batch: Batch) -> Batch:
        return batch[0].expand(-1, 3, -1, -1), batch[1]

    return replace(
        plain,
        model=lambda: ConvNet(width),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=rate),
        batch=lambda generator, size: colored(plain.batch(generator, size)),
        held_out=lambda: colored(plain.held_out()),
    )


GOALS: Mapping[str, Goal] = {
    "transformer-0.3M": Goal(_transformer(104, 2, 6e-3), steps=300, interval=10),
    "transformer-1M": Goal(_transformer(144, 4, 3e-3), steps=300, interval=10),
    "transformer-10M": Goal(_transformer(384, 6, 1e-3), steps=300, interval=10),
    "cnn-1M": Goal(_digits(64, 1e-3), steps=200, interval=10),
    "cnn-10M": Goal(_digits(208, 5e-4), steps=200, interval=10),
}
"""Learning rates as tuned for dense training, constant after a warm-up: with one that decays until a last step, a
method that needs more steps would be judged by when it was told to stop."""
