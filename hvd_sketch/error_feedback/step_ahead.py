"""SAEF: gradients are taken where the unsent errors are already applied."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.ahead import AheadOptimizer
from hvd_sketch.error_feedback.base import ErrorFeedback, Wrapping
from hvd_sketch.error_feedback.undo import Undo
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.methods.displacement import displacement_exchange
from hvd_sketch.methods.flat import Flat


@dataclass(frozen=True)
class StepAhead(ErrorFeedback):
    """Step-ahead error feedback, for ``DistributedOptimizer(…, error_feedback=StepAhead())``.

    With model x, error e_i of rank i in units of the update, compressor C and the wrapped
    optimizer's step Δ (for SGD ``lr m_i``, with its momentum and weight decay), which is local::

        z_i = x - a e_i                      where forward and backward run
        d_i = e_i + Δ(z_i)                   c_i = C(d_i)          e_i <- d_i - c_i
        x  <- x - mean_i c_i                 every P steps: e_i <- mean_i e_i

    So ``x - mean_i e_i`` moves by exactly ``-mean_i Δ``. a = 0 is ordinary error feedback, a = 1
    SAEF. With ``Compression.sharded`` the way down is compressed as well, and the server's error
    is part of its owner's e_i; there the owner steps ahead by its share 1/W of it.

    Sent: what the compressor sends, and ``total / P`` float32 values a step in the mean.
    Source: Xu, Huo, Huang, "Step-Ahead Error Feedback for Distributed Training with Compressed
    Gradient" (AAAI 2021), arXiv 2008.05823; a < 1: SA-PEF, arXiv 2601.20738.

    Attributes:
        coefficient: a, 0 to 1.
        averaging_period: P in steps; 0 for never.
    """

    coefficient: float = 1.0
    averaging_period: int = 20

    def __post_init__(self) -> None:
        if not 0.0 <= self.coefficient <= 1.0:
            raise ConfigurationError(f"StepAhead coefficient must be between 0 and 1, got {self.coefficient}")
        if self.averaging_period < 0:
            raise ConfigurationError(f"StepAhead averaging_period must be at least 0, got {self.averaging_period}")

    def check(self, optimizer: torch.optim.Optimizer, compression: Compressor) -> None:
        """Any optimizer that steps once a gradient will do."""
        return

    def wrap(self, wrapping: Wrapping) -> StepAheadOptimizer:
        """A `StepAheadOptimizer` over the user's own: no gradients are exchanged."""
        return StepAheadOptimizer(wrapping, self)


class StepAheadOptimizer(AheadOptimizer):
    """The optimizer that `StepAhead` asks for; used as `AheadOptimizer` says.

    Gradients are clipped on each rank to the compressor's ``clip_norm``. When some rank's
    gradient is not finite, or the exchange fails, then x, all errors and all ranks' optimizers stay
    as they were before the step. A ``torch.amp.GradScaler`` may be used as always.
    """

    def __init__(self, wrapping: Wrapping, settings: StepAhead) -> None:
        trained, compression = wrapping.trained, wrapping.compression
        super().__init__(wrapping.optimizer, trained, compression.layout(trained.items()), wrapping.is_active)
        self._compression, self._settings = compression, settings
        self._communicator, self._stepped = wrapping.communicator, self._flat.new()
        self._undo = Undo(wrapping.optimizer)

    @cached_property
    def exchange(self) -> Exchange:
        """The exchange, for its ``stats``; made on first use. Its memory's residual is e_i."""
        device = self._synchronous.vector.device
        exchange = displacement_exchange(self._compression, self._flat.layout, self._communicator(), device)
        exchange.agree_on(f"{self._settings} clip_norm={self._compression.clip_norm}")
        return exchange

    def synchronize(self) -> None:
        """Refused: gradients are never exchanged, only steps are."""
        raise ConfigurationError(
            "with error_feedback the step itself is exchanged, so there are no averaged gradients to look at; "
            "to clip, set the compressor's clip_norm"
        )

    def flush(self) -> None:
        """Send everything in the next step; then the model alone is a checkpoint for any number of ranks."""
        self.exchange.flush()

    def memory_state_dict(self) -> dict[str, Any]:
        """A copy of what belongs to this rank alone: its error, and its optimizer's state (momentum is local)."""
        self._refuse_saving()
        return {"exchange": self.exchange.state_dict(), "optimizer": copy.deepcopy(super().state_dict())}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part, after ``load_state_dict``; see `Exchange.load_state_dict`."""
        self.exchange.load_state_dict(state["exchange"])
        self.optimizer.load_state_dict(state["optimizer"])

    def advance(self) -> None:
        """A step of the wrapped optimizer from x - a e, exchanged as how far it went."""
        if not self._is_active():
            self.optimizer.step()
            return
        norm = float(torch.nn.utils.clip_grad_norm_(self._flat.parameters, self._compression.clip_norm or math.inf))
        exchange, taken = self.exchange, False
        self._undo.note()
        self._move_ahead()
        self._flat.read(self._ahead)  # as the parameters' dtype has it
        if math.isfinite(norm):
            self.optimizer.step()
            self._flat.read(self._stepped)
            exchange.submit_all(self._ahead.vector.sub_(self._stepped.vector))
        else:
            exchange.submit_all(self._ahead.vector.fill_(math.nan))
        try:
            exchange.run()
            taken = not math.isnan(float(exchange.update[0]))
        finally:
            if taken:
                self._synchronous.vector.sub_(exchange.update)
            else:
                self._undo.restore()
            self._flat.write(self._synchronous)
        period = self._settings.averaging_period
        if period and exchange.step % period == 0:
            exchange.average_memory()

    def point(self, ahead: Flat) -> None:
        """By the errors behind x, and of what this rank owns by its share."""
        residual, owned = self.exchange.memory.residual, self.exchange.owned
        coefficient, others = self._settings.coefficient, 1.0 - 1.0 / self.exchange.comm.size
        ahead.vector.sub_(residual, alpha=coefficient)
        ahead.vector[owned].add_(residual[owned], alpha=coefficient * others)

    def moves(self) -> bool:
        """Where there is anybody to exchange with, and a coefficient."""
        return self._settings.coefficient > 0.0 and self._is_active()

    def restart(self) -> None:
        """Forget the errors."""
        if "exchange" in vars(self):
            self.exchange.reset()
