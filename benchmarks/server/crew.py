"""Workers of a server in one process: those that have work to do take their local steps together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.server.digits import Digits
from hvd_sketch.layout import Layout


class Crew:
    """Local SGD on flat models of `benchmarks.server.digits.network`, float32.

    Nobody's steps depend on anybody else's between two models that he is sent, so the steps of all that have a model
    to begin at are taken at once, when the first of them is asked for his update.

    Args:
        layout: of the parameters.
        shares: the data of each worker.
        rate: the learning rate.
        period: local steps of an update.
        batch: images of a step.
        proximal: the strength of the pull to the model that a worker began at.
        seed: of the batches.
    """

    def __init__(
        self,
        layout: Layout,
        shares: Sequence[Digits],
        *,
        rate: float,
        period: int,
        batch: int,
        proximal: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._layout, self._shares = layout, shares
        self._rate, self._period, self._batch, self._proximal = rate, period, batch, proximal
        self._generator = torch.Generator().manual_seed(seed)
        self._begun: dict[int, Tensor] = {}
        self._updates: dict[int, Tensor] = {}

    def begin(self, worker: int, model: Tensor) -> None:
        """A worker begins at a model."""
        self._begun[worker] = model

    def update(self, worker: int) -> Tensor:
        """How far it went, as a gradient points."""
        if worker not in self._updates:
            self._work()
        return self._updates.pop(worker)

    def _work(self) -> None:
        workers = sorted(self._begun)
        begun = torch.stack([self._begun.pop(worker) for worker in workers])
        models = begun.clone().requires_grad_()
        for _ in range(self._period):
            batches = [self._shares[worker].batch(self._generator, self._batch) for worker in workers]
            (gradients,) = torch.autograd.grad(self._loss(models, batches), models)
            gradients += self._proximal * (models.detach() - begun)
            models.data.sub_(gradients, alpha=self._rate)
        self._updates |= dict(zip(workers, begun - models.detach(), strict=True))

    def _loss(self, models: Tensor, batches: list[Digits]) -> Tensor:
        """The sum of the losses of all models, each on its own batch."""
        slots = {slot.name: models[:, slot.offset : slot.stop] for slot in self._layout.slots}
        here = torch.stack([batch.images for batch in batches])
        for layer in ("0", "2"):
            weight, bias = slots[f"{layer}.weight"], slots[f"{layer}.bias"]
            inner = here if layer == "0" else here.relu()
            here = torch.baddbmm(bias.unsqueeze(1), inner, weight.view(len(models), bias.shape[1], -1).mT)
        labels = torch.cat([batch.labels for batch in batches])
        return F.cross_entropy(here.flatten(0, 1), labels, reduction="sum") / self._batch
