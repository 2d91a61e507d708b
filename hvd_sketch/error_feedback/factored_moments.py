"""Second moments for Adam of what the ranks computed, where what was sent is too sparse to measure them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import gpu
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.layout import Slot
from hvd_sketch.saved import Form
from hvd_sketch.settings import check_numbers
from hvd_sketch.shards import local
from hvd_sketch.sketch.narrow import CELLS, NarrowSketches

_GROWTH = 4


@dataclass(frozen=True)
class FactoredMoments:
    """Second moments of the dense mean gradient, for ``Anticipate(second_moments=FactoredMoments())``.

    Adam divides a step by the root of v, the running mean of squared gradients. Of compressed
    gradients v is wrong: a coordinate that is sent once in fifty steps then carries fifty gradients,
    is squared, and counts as nothing in between. With g_r the clipped gradient of rank r of a
    parameter, as a matrix of as many rows as its first dimension has (a vector is one row)::

        v_ij = |mean_r g_r|^2 (R_i / sum R) (C_j / sum C)
        R_i = mean_r sum_j g_r,ij^2       C_j = mean_r sum_i g_r,ij^2

    each smoothed over steps. Adam steps with that v, but with no less than its own one step would
    make of it, ``(1 - b2) u^2`` for the update u. Then a step is linear in what was sent, to a
    factor that changes slowly, and what was left out is made up for exactly when it is sent.

    Coordinates that travel whole in every step keep Adam's own v, and so does everything before the
    second step. ``optimizer.state_dict()`` holds v where Adam keeps it. With everything sent,
    this is Adam with factored second moments and no longer the dense Adam. Measured to help on text,
    and not on a CNN whose loss is close to zero: ``docs/convergence.md``.

    Kept: one float32 more for every compressed coordinate. Sent: rows + columns + 32 floats of eight bits
    a parameter, see `hvd_sketch.exchange.coarse`, each off by a sixteenth at most on every rank and once more in the
    sum, after steps 1, 2, 3, 4, 6, 8, 11, … and later at every ``interval``. Sources: the factors are those of
    Adafactor (arXiv 1804.04235); that error feedback wants a v that stands still is from 1-bit Adam (arXiv
    2102.02888), and measuring it ever more rarely from 0/1 Adam (arXiv 2202.06009).

    Attributes:
        decay: weight that a measurement keeps a step later, as Adam's b2: at least 0, below 1.
        interval: most steps between two measurements.
    """

    decay: float = 0.999
    interval: int = 50

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0.0 <= self.decay < 1.0:
            raise ConfigurationError(f"FactoredMoments decay must be at least 0 and below 1, got {self.decay}")
        if self.interval < 1:
            raise ConfigurationError(f"FactoredMoments interval must be at least 1, got {self.interval}")


class MomentsObserver:
    """Follows an exchange, measures when it is time, and lends v to Adam for its steps."""

    def __init__(self, settings: FactoredMoments, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self._settings = settings
        self._named = dict(named_parameters)
        self._moments: dict[Tensor, Tensor] = {}
        self._measured = self._count = 0

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from its first step on."""
        self._slots = [slot for slot in exchange.layout.slots if slot.offset < exchange.layout.compressed]
        self._rows = [slot.shape[0] if len(slot.shape) > 1 else 1 for slot in self._slots]
        device, count = exchange.gradient.device, len(self._slots)
        sizes = [
            size for slot, rows in zip(self._slots, self._rows, strict=True) for size in (rows, slot.numel // rows)
        ]
        self._message = torch.zeros(count * CELLS + sum(sizes), dtype=torch.float32, device=device)
        self._tables = self._message[: count * CELLS].view(count, CELLS)
        self._factors = self._message[count * CELLS :].split(sizes)
        self._smoothed = torch.zeros(count + sum(sizes), dtype=torch.float32, device=device)
        self._vector = torch.zeros(exchange.layout.compressed, dtype=torch.float32, device=device)
        self._sketches = NarrowSketches([(slot.offset, slot.stop) for slot in self._slots], device)
        self._moments = {
            self._named[slot.name]: self._vector[slot.offset : slot.stop].view(slot.shape) for slot in self._slots
        }
        self._kernels = _kernels(self._slots, self._rows, device) if gpu.serves(self._vector) else None
        exchange.agree_on(f"second_moments={self._settings}")
        exchange.observers.append(self)

    def observe(self, exchange: Exchange) -> None:
        """Measure, when it is time."""
        self._count += 1
        if self._count - self._measured >= min(self._settings.interval, 1 + self._measured // _GROWTH):
            self._measure(exchange)

    def lend(self, optimizer: torch.optim.Optimizer) -> None:
        """Set Adam's running means so that the coming step divides by v: it adds ``(1 - b2) u^2`` to b2 times them."""
        if not self._measured:
            return
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        lent = [p for p in self._moments if p in groups and p.grad is not None and optimizer.state.get(p)]
        numbers = {p: _numbers(groups[p]["betas"][1], float(optimizer.state[p]["step"])) for p in lent}
        means = {p: local(optimizer.state[p]["exp_avg_sq"]) for p in lent}
        if self._kernels is not None and self._kernels.serves(means):
            self._kernels.lend(self._vector, means, numbers, list(self._moments))
            return
        for pair in dict.fromkeys(numbers.values()):
            its = [p for p in lent if numbers[p] == pair]
            sizes = [means[p] for p in its]
            torch._foreach_copy_(sizes, [self._moments[p] for p in its])
            torch._foreach_mul_(sizes, pair[0])
            updates = [local(p.grad) for p in its if p.grad is not None]
            torch._foreach_addcmul_(sizes, updates, updates, value=-pair[1])
            torch._foreach_clamp_min_(sizes, 0.0)

    def _measure(self, exchange: Exchange) -> None:
        gradient, clip = exchange.in_model(exchange.gradient), exchange.stats.clip
        self._tables.copy_(self._sketches(gradient, exchange.step, clip))
        self._sum_squares(gradient, clip)
        exchange.rounds.sum_coarsely(self._message, "moments")
        if not bool(self._message.isfinite().all()):
            return
        common = self._tables.square().sum(dim=1)
        fresh = torch.cat([common / exchange.comm.size**2, *self._factors])
        new = 1.0 - self._settings.decay ** (self._count - self._measured)
        self._smoothed.lerp_(fresh, new / (1.0 - self._settings.decay**self._count))
        self._measured = self._count
        self._spread()

    def _sum_squares(self, gradient: Tensor, clip: float) -> None:
        """The factors, into the message."""
        if self._kernels is not None:
            self._kernels.sum_squares(gradient, clip, self._message[self._tables.numel() :])
            return
        for slot, rows, (row, column) in zip(self._slots, self._rows, self._pairs(), strict=True):
            squares = gradient[slot.offset : slot.stop].mul(clip).square_().view(rows, -1)
            torch.sum(squares, dim=1, out=row)
            torch.sum(squares, dim=0, out=column)

    def _spread(self) -> None:
        """The vector of v, from the smoothed energies and factors."""
        if self._kernels is not None:
            self._kernels.spread(self._smoothed[: len(self._slots)], self._smoothed[len(self._slots) :], self._vector)
            return
        common, *factors = self._smoothed.split([len(self._slots), *(len(factor) for factor in self._factors)])
        for slot, energy, row, column in zip(self._slots, common, factors[::2], factors[1::2], strict=True):
            scale = energy / (row.sum() * column.sum()).clamp_min(torch.finfo(torch.float32).tiny)
            torch.outer(row * scale, column, out=self._vector[slot.offset : slot.stop].view(len(row), -1))

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(pairwise(self._factors))[::2]

    def state_dict(self) -> dict[str, Any]:
        """The smoothed measurements, and when the last one was."""
        return {"smoothed": self._smoothed.clone(), "measured": self._measured, "count": self._count}

    def state_form(self) -> Form:
        """As many measurements."""
        return {"smoothed": self._smoothed, "measured": int, "count": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._smoothed.copy_(state["smoothed"])
        self._measured, self._count = state["measured"], state["count"]
        self._spread()


def _numbers(second: float, taken: float) -> tuple[float, float]:
    """For Adam's b2 and steps taken, a and b: it divides by v when its running mean is ``a v - b u^2``."""
    return (1.0 - second ** (taken + 1.0)) / second, (1.0 - second) / second


def _kernels(slots: list[Slot], rows: list[int], device: torch.device) -> Any:
    kernels = importlib.import_module("hvd_sketch.error_feedback.moments_cuda")  # with Triton
    return kernels.Moments([(slot.offset, slot.stop) for slot in slots], rows, device)


def check_adam(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers that have no second moments, or keep them elsewhere.

    Raises:
        ConfigurationError: naming those that do.
    """
    adam = isinstance(optimizer, torch.optim.Adam)
    if not adam or any(group["amsgrad"] or group["betas"][1] == 0.0 for group in optimizer.param_groups):
        raise ConfigurationError(
            "Anticipate(second_moments=…) is for torch.optim.Adam and AdamW (with b2 above 0, without amsgrad), "
            f"not for {type(optimizer).__name__}; leave it out"
        )
