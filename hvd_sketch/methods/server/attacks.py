"""What hostile workers send, for tests and benchmarks of rules that bear them.

`Local` attacks need only what their worker has. Omniscient ones know the updates of all honest workers; where
nobody works in rounds, the last one of each. All of them can be given to `AsyncSGD` in ``outgoing``.
Updates point as gradients do.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Honest = Callable[[], Tensor]
"""The honest workers' updates, ``(workers, d)``."""


class Local(ABC):
    """An attack that works on its worker's own update.

    Args:
        seed: of its random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    @abstractmethod
    def __call__(self, update: Tensor) -> Tensor:
        """What is sent in place of an update."""

    def _normal(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self._generator)


class SignFlip(Local):
    """``-scale u``."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self._scale = scale

    def __call__(self, update: Tensor) -> Tensor:
        return -self._scale * update


class Gaussian(Local):
    """Noise of standard deviation ``sigma``, whatever the update."""

    def __init__(self, sigma: float = 200.0, seed: int = 0) -> None:
        super().__init__(seed)
        self._sigma = sigma

    def __call__(self, update: Tensor) -> Tensor:
        return self._sigma * self._normal(update)


class RandomDirection(Local):
    """A random direction, ``scale`` times as long as the update."""

    def __init__(self, scale: float = 8.0, seed: int = 0) -> None:
        super().__init__(seed)
        self._scale = scale

    def __call__(self, update: Tensor) -> Tensor:
        noise = self._normal(update)
        length = self._scale * float(torch.linalg.vector_norm(update))
        return noise * (length / float(torch.linalg.vector_norm(noise)))


class Zero(Local):
    """Nothing."""

    def __call__(self, update: Tensor) -> Tensor:
        return torch.zeros_like(update)


class NotANumber(Local):
    """Not a number, in every coordinate."""

    def __call__(self, update: Tensor) -> Tensor:
        return torch.full_like(update, torch.nan)


class Replay(Local):
    """Honest ``after`` times, and from then on the first update again and again."""

    def __init__(self, after: int = 1) -> None:
        super().__init__()
        self._left = after
        self._first: Tensor | None = None

    def __call__(self, update: Tensor) -> Tensor:
        if self._first is None:
            self._first = update.clone()
        self._left -= 1
        return update if self._left >= 0 else self._first.clone()


def flip_labels(labels: Tensor, classes: int) -> Tensor:
    """``C - 1 - y``: the labels of a worker whose data are wrong."""
    return classes - 1 - labels


class Omniscient(ABC):
    """An attack that knows what all honest workers send.

    Args:
        honest: their updates.
    """

    def __init__(self, honest: Honest) -> None:
        self._honest = honest

    def __call__(self, update: Tensor) -> Tensor:
        """What is sent in place of an update."""
        return self.craft(self._honest()).to(update)

    @abstractmethod
    def craft(self, honest: Tensor) -> Tensor:
        """From the honest updates, ``(workers, d)``."""


class BitFlip(Omniscient):
    """The negative of the first honest worker's update, sent by all hostile ones."""

    def craft(self, honest: Tensor) -> Tensor:
        return -honest[0]


class InnerProduct(Omniscient):
    """``-epsilon mean``: small enough to pass for one of the others, and the other way.

    Source: Xie, Koyejo, Gupta, "Fall of Empires" (UAI 2019).
    """

    def __init__(self, honest: Honest, epsilon: float = 0.5) -> None:
        super().__init__(honest)
        self._epsilon = epsilon

    def craft(self, honest: Tensor) -> Tensor:
        return -self._epsilon * honest.mean(0)


class ALittleIsEnough(Omniscient):
    """``mean - z std`` of every coordinate, the population's, as far off as a majority can still be.

    Source: Baruch, Baruch, Goldberg, "A Little Is Enough" (NeurIPS 2019).

    Args:
        honest: their updates.
        z: see `little_enough`.
    """

    def __init__(self, honest: Honest, z: float) -> None:
        super().__init__(honest)
        self._z = z

    def craft(self, honest: Tensor) -> Tensor:
        return honest.mean(0) - self._z * honest.std(0, correction=0)


def little_enough(workers: int, hostile: int) -> float:
    """z of `ALittleIsEnough` for m workers of which f are hostile: the normal quantile of
    ``(m - f - s) / (m - f)`` with ``s = m // 2 + 1 - f``."""
    honest, needed = workers - hostile, workers // 2 + 1 - hostile
    return statistics.NormalDist().inv_cdf((honest - needed) / honest)
