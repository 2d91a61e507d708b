"""One training with many ranks' worth of batches in one process, through the real exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.tasks import Task
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.compressor import Compressor
from hvd_sketch.exchange import Exchange

DIVERGED = 50.0


@dataclass
class Outcome:
    """How a training went: validation losses by step, and the bytes one rank sent until then."""

    losses: list[tuple[int, int, float]] = field(default_factory=list)
    diverged: bool = False

    @property
    def final_loss(self) -> float:
        """The last validation loss."""
        return self.losses[-1][2]


def train(task: Task, compressor: Compressor | None, *, ranks: int, seed: int, steps: int) -> Outcome:
    """Train on ``ranks`` batches a step, dense (``compressor=None``) or through one exchange a rank.

    All ranks hold the same parameters after every step, so one model serves all; BatchNorm's
    running statistics see every rank's batch.
    """
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
    )
    group = InProcessGroup(ranks)
    exchanges = _exchanges(compressor, model, group) if compressor is not None else []
    generator = torch.Generator().manual_seed(seed + 1)
    outcome = Outcome()
    for step in range(steps):
        images, labels = task.batch(generator, ranks * task.batch_size)
        if exchanges:
            _exchanged_gradients(model, images.chunk(ranks), labels.chunk(ranks), exchanges, group)
        else:
            optimizer.zero_grad()
            for inputs, targets in zip(images.chunk(ranks), labels.chunk(ranks), strict=True):
                (F.cross_entropy(model(inputs), targets) / ranks).backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 12) == 0 or step == steps - 1:
            loss = _validate(model, task)
            sent = exchanges[0].stats.bytes_sent if exchanges else _dense_bytes(model, ranks) * (step + 1)
            outcome.losses.append((step + 1, sent, loss))
            if not loss < DIVERGED:
                outcome.diverged = True
                break
    return outcome


def _exchanges(compressor: Compressor, model: nn.Module, group: InProcessGroup) -> list[Exchange]:
    layout = compressor.layout(model.named_parameters())
    return [
        compressor.exchange(layout, comm, average=True, device=torch.device("cpu")) for comm in group.communicators
    ]


def _exchanged_gradients(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    exchanges: list[Exchange],
    group: InProcessGroup,
) -> None:
    positions = exchanges[0].layout.index()
    for exchange, own_inputs, own_targets in zip(exchanges, inputs, targets, strict=True):
        model.zero_grad()
        F.cross_entropy(model(own_inputs), own_targets).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                exchange.submit(positions[name], parameter.grad)
    group.run(lambda comm: exchanges[comm.rank].run())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(exchanges[0].update_of(positions[name]))


def _validate(model: nn.Module, task: Task) -> float:
    model.eval()
    inputs, targets = task.held_out()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(inputs), targets))
    model.train()
    return loss if math.isfinite(loss) else math.inf


def _dense_bytes(model: nn.Module, ranks: int) -> int:
    return 2 * (ranks - 1) * 4 * sum(parameter.numel() for parameter in model.parameters()) // ranks
