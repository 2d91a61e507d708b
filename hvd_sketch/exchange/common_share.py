"""How much of what the ranks have not sent they have in common, parameter by parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_sketch.exchange.base import Exchange
from hvd_sketch.saved import Form, Maybe
from hvd_sketch.sketch.narrow import CELLS, NarrowSketches

_EVERY = 10
_AT_FIRST = 4
_WEIGHT = 0.3


class CommonShare:
    """Follows an exchange and estimates, for every parameter p::

        c_p = |mean_i e_i|^2 / mean_i |e_i|^2         e_i: what rank i has not sent of p, W ranks

    That is the factor by which ``c_p e_i`` comes closest to what the ranks together will send: 1 where
    all hold the same, 1/W where they only hold noise of their own. The norm of the sum is read out of
    a summed Count Sketch of one row and 32 columns a parameter, drawn anew every time: of standard error
    a quarter, and smoothed. Where an owner's memory is the sum of what all left out, see
    `Exchange.owned`, e_i below the line is its share 1/W, and above it the whole, see `Exchange.unsent`.

    Sent: 33 floats of eight bits a parameter in the first four steps, and in every tenth, see
    `hvd_sketch.exchange.coarse`; what their rounding adds to the standard error is small.
    """

    def __init__(self) -> None:
        self._smoothed: Tensor | None = None
        self._count = 0

    @property
    def shares(self) -> Tensor | None:
        """c of every parameter in the layout's order, 0 to 1, alike on all ranks; None before the first step."""
        return None if self._smoothed is None else self._smoothed.clamp(max=1.0)

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from its first step on."""
        slots, device = exchange.layout.slots, exchange.gradient.device
        self._message = torch.zeros(len(slots), CELLS + 1, dtype=torch.float32, device=device)
        self._sketches = NarrowSketches([(slot.offset, slot.stop) for slot in slots], device)
        exchange.follow_memory()
        exchange.observers.append(self)

    def observe(self, exchange: Exchange) -> None:
        """Measure, when it is time."""
        if self._count < _AT_FIRST or self._count % _EVERY == 0:
            fresh, old = self._measure(exchange), self._smoothed
            weight = max(_WEIGHT, 1.0 / (self._count + 1))
            self._smoothed = fresh if old is None else (1.0 - weight) * old + weight * fresh
        self._count += 1

    def _measure(self, exchange: Exchange) -> Tensor:
        ranks = exchange.comm.size
        errors, unsent = exchange.memory.residual, exchange.unsent()
        tables, energies = self._sketches.measure(unsent, exchange.step, exchange.owned)
        if unsent is not errors:
            energies = self._sketches.measure(errors, exchange.step, exchange.owned)[1]
        torch.cat([tables, energies.unsqueeze(1)], dim=1, out=self._message)
        exchange.rounds.sum_coarsely(self._message, "common")
        common = self._message[:, :CELLS].square().sum(dim=1)
        return torch.where(common > 0.0, common / (ranks * self._message[:, CELLS]), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The estimate, and when the next is due."""
        return {"smoothed": self._smoothed, "count": self._count}

    def state_form(self) -> Form:
        """A number a parameter."""
        return {"smoothed": Maybe(self._message[:, 0]), "count": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._smoothed, self._count = state["smoothed"], state["count"]


def read_errors(exchange: Exchange, into: Tensor) -> None:
    """Copy this rank's e_i, of the model, in the layout's order: its memory, and of what it owns its share."""
    into.copy_(exchange.memory.residual)
    into[exchange.owned] /= exchange.comm.size
    exchange.domain.leave(into)
