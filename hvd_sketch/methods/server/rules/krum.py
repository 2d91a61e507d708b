"""Krum: the push that has its neighbours nearest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import Gathered, Push, check
from hvd_sketch.settings import given_numbers


class MultiKrum(Gathered):
    """The mean of the ``keep`` pushes with the least scores, of equal ones the lower ranks.

    With m workers, of which ``hostile`` are::

        score_i = sum of the m - hostile - 2 least |u_i - u_j|^2, j other than i

    Needs ``m >= 2 hostile + 3``. Source: Blanchard et al., "Machine Learning with Adversaries"
    (NeurIPS 2017).

    Args:
        hostile: f in the paper.
        keep: k, at least 1.
    """

    @given_numbers
    def __init__(self, hostile: int, keep: int) -> None:
        check(
            type(self).__name__,
            hostile=(hostile >= 0, "at least 0", hostile),
            keep=(keep >= 1, "at least 1", keep),
        )
        self._hostile, self._keep = hostile, keep
        self.least = max(2 * hostile + 3, keep)

    def _combine(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        updates = torch.stack([push.change for push in pushes])
        kept = self.choose(updates)
        model.sub_(updates[kept].mean(0))
        return [i in kept for i in range(len(pushes))]

    def choose(self, updates: Tensor) -> list[int]:
        """Rows of ``(workers, d)`` whose mean counts, ascending."""
        scores = self.scores(updates).tolist()
        return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[: self._keep])

    def scores(self, updates: Tensor) -> Tensor:
        """Of the rows of ``(workers, d)``, float64."""
        count = len(updates)
        distances = torch.zeros(count, count, dtype=torch.float64, device="cpu")
        for i in range(count):  # a product of all would round differences of large vectors away
            distances[i] = (updates - updates[i]).square().sum(1, dtype=torch.float64)
        distances.fill_diagonal_(torch.inf)
        return distances.sort(dim=1).values[:, : count - self._hostile - 2].sum(1)


class Krum(MultiKrum):
    """The one push with the least score; see `MultiKrum`."""

    def __init__(self, hostile: int) -> None:
        super().__init__(hostile, 1)
