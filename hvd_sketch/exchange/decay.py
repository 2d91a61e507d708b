"""A memory that forgets, and keeps what it has in steps rather than gradients."""

from __future__ import annotations

from typing import Any

from hvd_sketch.exchange.base import Exchange
from hvd_sketch.saved import Form, Maybe


class Decay:
    """Follows an exchange, and after every step multiplies what was not sent::

        e <- decay (l' / l) e          l: the optimizer's learning rate in this step; l' in the one before

    A memory without decay is the sum of all gradients that were not sent; with it, as momentum is, of the last
    ``1 / (1 - decay)`` or so. What is forgotten is lost. As the learning rate changes, a gradient keeps the weight
    that its own step gave it, so that those of a warm-up do not outweigh what comes after them.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._rate: float | None = None

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from its first step on."""
        exchange.observers.append(self)

    def observe(self, exchange: Exchange) -> None:
        """Forget a little."""
        rate = next((float(group["lr"]) for group in exchange.drift.groups() if "lr" in group), None)
        changed = self._rate / rate if rate and self._rate else 1.0
        exchange.memory.residual.mul_(self._decay * changed)
        self._rate = rate or self._rate

    def state_dict(self) -> dict[str, Any]:
        """The last learning rate."""
        return {"rate": self._rate}

    def state_form(self) -> Form:
        """A number, if one is known."""
        return {"rate": Maybe(float)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rate = state["rate"]
