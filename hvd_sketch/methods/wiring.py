"""How an optimizer that exchanges gradients is connected, and what it offers beside what an optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch.exchange import Exchange
from hvd_sketch.memory import Momentum

ExchangeFactory = Callable[[dict[str, Tensor], Momentum | None], Exchange]


class Follower(Protocol):
    """Asks to be told of every step of an exchange; see `Exchange.observers`."""

    def attach(self, exchange: Exchange) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How an optimizer is connected.

    Attributes:
        make_exchange: from the parameters that it trains and the momentum correction; called once, on first use.
        is_active: whether there is anybody to exchange with.
        backward_passes_per_step: local passes whose gradients are added up before an exchange.
        sparse_as_dense: turn sparse gradients into dense ones instead of refusing them.
        grad_scaler: the scaler in use, if it is told.
        correction: the momentum that is applied before the exchange in place of the optimizer's own.
        followers: attached to the exchange when it is made.
        resync_every: see `Exchange.resync_every`.
        note: what is logged of how it is connected.
        before_step: called between the exchange and the step.
        attributes: what else Horovod's own optimizer has.
    """

    make_exchange: ExchangeFactory
    is_active: Callable[[], bool]
    backward_passes_per_step: int = 1
    sparse_as_dense: bool = False
    grad_scaler: torch.amp.GradScaler | None = None
    correction: Momentum | None = None
    followers: Sequence[Follower] = ()
    resync_every: int = 0
    note: str = "error_feedback=None"
    before_step: Callable[[torch.optim.Optimizer], None] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


class HorovodOptimizer(torch.optim.Optimizer):
    """What Horovod's distributed optimizer offers beside what an optimizer does; for type checkers."""

    def synchronize(self) -> None:
        """Reduce the step's gradients."""

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """Let `step` inside the block leave the gradients alone, after a `synchronize` by hand."""
        raise NotImplementedError

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accumulate so many backward passes (a sum) before a reduction."""
