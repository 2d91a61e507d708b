"""A memory that forgets."""

from __future__ import annotations

from typing import Any

from hvd_sketch.exchange.base import Exchange
from hvd_sketch.saved import Form


class Decay:
    """Follows an exchange, and after every step multiplies what was not sent by a number below 1.

    A memory without it is the sum of all gradients that were not sent; with it, as momentum is, of the last
    ``1 / (1 - decay)`` or so. What is forgotten is lost.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def attach(self, exchange: Exchange) -> None:
        """Follow an exchange from its first step on."""
        exchange.observers.append(self)

    def observe(self, exchange: Exchange) -> None:
        """Forget a little."""
        exchange.memory.residual.mul_(self._decay)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state_form(self) -> Form:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
        return
