"""Noise on what leaves a worker."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.methods.server.rules.base import above_0, at_least_0, check
from hvd_sketch.settings import given_numbers


class LocalNoise:
    """Clips an update to norm S and adds noise of standard deviation sigma S to every coordinate::

        u <- u min(1, S / |u|) + N(0, (sigma S)^2)

    An update tells of the data it was made of, and without noise much of it can be read from it. This is the
    Gaussian mechanism on one push; what all pushes of a run reveal together, an (ε, δ), is for a library
    made for that, from ``sigma`` and `pushes`. Noise of d coordinates is about ``sigma S sqrt(d)`` long, so it
    hides the direction too: the cosine to another vector falls by ``|u| / sqrt(|u|^2 + d (sigma S)^2)``, and a
    rule that judges by it must expect values near 0.

    Give it to `AsyncSGD` in ``outgoing``. Whatever is chosen and coded afterwards reveals no more.

    Args:
        clip: S, in units of an update.
        sigma: the noise multiplier.
        seed: of this worker's noise, secret and its own; from the system when not given.

    Attributes:
        pushes: so far.
    """

    @given_numbers
    def __init__(self, clip: float, sigma: float, seed: int | None = None) -> None:
        check("LocalNoise", clip=above_0(clip), sigma=at_least_0(sigma))
        self.clip, self.sigma, self.pushes = clip, sigma, 0
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, update: Tensor) -> Tensor:
        """The update as it may leave; works in place."""
        self.pushes += 1
        update.mul_(min(1.0, self.clip / max(float(torch.linalg.vector_norm(update)), 1e-30)))
        noise = torch.empty_like(update).normal_(generator=self._generator)
        return update.add_(noise, alpha=self.sigma * self.clip)
