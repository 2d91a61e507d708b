"""Gradients in units of their tensor's size, so that no tensor waits because another one's are larger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_sketch.exchange.base import Exchange
from hvd_sketch.saved import Form, Maybe

_EVERY = 10
_AT_FIRST = 4
_WEIGHT = 0.3
_LEAST = 1e-4


class TensorScales:
    """Follows an exchange, measures the size of every tensor's gradient, and sets the scales of its `Domain`::

        s_q = running mean of mean_i rms(g_i[q])          g_i[q]: rank i's gradient of tensor q, clipped
        f_q = max(s_q / sqrt(mean_q s_q^2), 1e-4)^p

    Coordinates are then compared, coded and sent as ``g / f``: p = 0 compares gradients, p = 1 their share of
    their tensor's size. Tensors without a gradient, and those that are sent whole, have f = 1.

    Sent: a float of eight bits a tensor, in the first four steps and in every tenth.
    """

    def __init__(self, power: float) -> None:
        self._power = power
        self._smoothed: Tensor | None = None
        self._count = 0

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from its first step on."""
        self._exchange, self._slots = exchange, exchange.layout.slots
        exchange.domain.scales = [1.0] * len(self._slots)
        sizes = [max(1, slot.numel) for slot in self._slots]
        self._roots = torch.tensor(sizes, dtype=torch.float32, device=exchange.gradient.device).sqrt_()
        exchange.observers.append(self)

    def observe(self, exchange: Exchange) -> None:
        """Measure, when it is time."""
        if self._count < _AT_FIRST or self._count % _EVERY == 0:
            fresh, weight = self._measure(exchange), max(_WEIGHT, 1.0 / (self._count + 1))
            self._smoothed = fresh if self._smoothed is None else self._smoothed.lerp(fresh, weight)
            memory = exchange.memory
            kept = [memory.residual] if memory.velocity is None else [memory.residual, memory.velocity]
            exchange.domain.rescale(self._scales(self._smoothed), *kept)
        self._count += 1

    def _measure(self, exchange: Exchange) -> Tensor:
        """The sizes of the step's gradients, by tensor, on the host."""
        parts = [exchange.gradient[slot.offset : slot.stop] for slot in self._slots]
        norms = torch.stack(torch._foreach_norm(parts)).mul_(float(exchange.stats.clip))
        exchange.rounds.sum_coarsely(norms.div_(self._roots), "scales")
        sizes = norms.div_(exchange.comm.size).cpu()
        return sizes * torch.tensor(exchange.domain.scales, dtype=torch.float32, device="cpu")

    def _scales(self, sizes: Tensor) -> list[float]:
        whole = sizes.square().mean().sqrt()
        if not float(whole) > 0.0:
            return [1.0] * len(self._slots)
        scales = (sizes / whole).clamp_min_(_LEAST).pow_(self._power).tolist()
        compressed = self._exchange.layout.compressed
        given = zip(scales, self._slots, sizes.tolist(), strict=True)
        return [scale if size > 0.0 and slot.stop <= compressed else 1.0 for scale, slot, size in given]

    def state_dict(self) -> dict[str, Any]:
        """The sizes, and when the next are due."""
        return {"smoothed": self._smoothed, "count": self._count}

    def state_form(self) -> Form:
        """A number a tensor."""
        return {"smoothed": Maybe(torch.zeros(len(self._slots), dtype=torch.float32, device="cpu")), "count": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the memory that was saved with it has its scales."""
        self._smoothed, self._count = state["smoothed"], state["count"]
        ones = [1.0] * len(self._slots)
        self._exchange.domain.scales = ones if self._smoothed is None else self._scales(self._smoothed)
