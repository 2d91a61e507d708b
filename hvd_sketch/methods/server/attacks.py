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

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.server.rules.base import above_0, at_least_0, check, finite
from hvd_sketch.settings import given_numbers

Honest = Callable[[], Tensor]
"""The honest workers' updates, ``(workers, d)``."""


class Local(ABC):
    """An attack that works on its worker's own update.

    Args:
        seed: of its random numbers.
    """

    @given_numbers
    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    @abstractmethod
    def __call__(self, update: Tensor) -> Tensor:
        """What is sent in place of an update."""

    def _normal(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self._generator)


class SignFlip(Local):
    """``-scale u``."""

    @given_numbers
    def __init__(self, scale: float = 1.0) -> None:
        check("SignFlip", scale=above_0(scale))
        super().__init__()
        self._scale = scale

    def __call__(self, update: Tensor) -> Tensor:
        return -self._scale * update


class Gaussian(Local):
    """Noise of standard deviation ``sigma``, whatever the update."""

    @given_numbers
    def __init__(self, sigma: float = 200.0, seed: int = 0) -> None:
        check("Gaussian", sigma=at_least_0(sigma))
        super().__init__(seed)
        self._sigma = sigma

    def __call__(self, update: Tensor) -> Tensor:
        return self._sigma * self._normal(update)


class RandomDirection(Local):
    """A random direction, ``scale`` times as long as the update."""

    @given_numbers
    def __init__(self, scale: float = 8.0, seed: int = 0) -> None:
        check("RandomDirection", scale=above_0(scale))
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

    @given_numbers
    def __init__(self, after: int = 1) -> None:
        check("Replay", after=(after >= 1, "at least 1 update", after))
        super().__init__()
        self._left = after
        self._first: Tensor | None = None

    def __call__(self, update: Tensor) -> Tensor:
        if self._first is None:
            self._first = update.clone()
        self._left -= 1
        return update if self._left >= 0 else self._first.clone()


@given_numbers
def flip_labels(labels: Tensor, classes: int) -> Tensor:
    """``C - 1 - y``: the labels of a worker whose data are wrong.

    Args:
        labels: y, whole numbers from 0 to C - 1, of any shape.
        classes: C, at least 2.

    Raises:
        ConfigurationError: for anything else.
    """
    check("flip_labels", classes=(classes >= 2, "at least 2", classes))
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise ConfigurationError(f"flip_labels: labels must be a tensor of whole numbers, got {labels!r}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ConfigurationError(
            f"flip_labels: labels must be from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}; "
            "give classes as many as there are"
        )
    return classes - 1 - labels


class Omniscient(ABC):
    """An attack that knows what all honest workers send.

    Args:
        honest: their updates.
    """

    def __init__(self, honest: Honest) -> None:
        check(type(self).__name__, honest=(callable(honest), "a function that returns the honest updates", honest))
        self._honest = honest

    def __call__(self, update: Tensor) -> Tensor:
        """What is sent in place of an update.

        Raises:
            ConfigurationError: when the honest updates are none, or not like this one.
        """
        updates = self._honest()
        if (
            not isinstance(updates, Tensor)
            or updates.dim() != 2
            or updates.shape[1:] != update.shape
            or not len(updates)
        ):
            form = tuple(updates.shape) if isinstance(updates, Tensor) else repr(updates)
            raise ConfigurationError(
                f"{type(self).__name__}: honest must return updates as a tensor (workers, {update.numel()}) of at "
                f"least one worker, and returned {form}"
            )
        return self.craft(updates).to(update)

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

    @given_numbers
    def __init__(self, honest: Honest, epsilon: float = 0.5) -> None:
        check("InnerProduct", epsilon=above_0(epsilon))
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

    @given_numbers
    def __init__(self, honest: Honest, z: float) -> None:
        check("ALittleIsEnough", z=finite(z))
        super().__init__(honest)
        self._z = z

    def craft(self, honest: Tensor) -> Tensor:
        return honest.mean(0) - self._z * honest.std(0, correction=0)


@given_numbers
def little_enough(workers: int, hostile: int) -> float:
    """z of `ALittleIsEnough` for m workers of which f are hostile: the normal quantile of
    ``(m - f - s) / (m - f)`` with ``s = m // 2 + 1 - f``.

    Args:
        workers: m, at least 3.
        hostile: f, at most ``m // 2``: a majority needs nobody else.

    Raises:
        ConfigurationError: for other numbers.
    """
    check("little_enough", workers=(workers >= 3, "at least 3", workers))
    check("little_enough", hostile=(0 <= hostile <= workers // 2, f"from 0 to {workers // 2}, half of all", hostile))
    honest, needed = workers - hostile, workers // 2 + 1 - hostile
    return statistics.NormalDist().inv_cdf((honest - needed) / honest)
