"""SAEF: gradients are taken where the unsent errors are already applied."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.ahead import Ahead, AheadOptimizer
from hvd_sketch.error_feedback.base import ErrorFeedback, Wrapping
from hvd_sketch.error_feedback.undo import Undo
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.common_share import read_errors
from hvd_sketch.exchange.gradients import watch
from hvd_sketch.exchange.scaling import LossScale
from hvd_sketch.methods.displacement import displacement_exchange
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.methods.wrapper import Method
from hvd_sketch.settings import check_numbers


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

    Sent: what the compressor sends; with averaging, ``total / P`` float32 values a step besides, in the mean:
    every 20 steps make a ratio of 13.3 out of 40.
    Source: Xu, Huo, Huang, "Step-Ahead Error Feedback for Distributed Training with Compressed
    Gradient" (AAAI 2021), arXiv 2008.05823; a < 1: SA-PEF, arXiv 2601.20738.

    Attributes:
        coefficient: a, 0 to 1.
        averaging_period: P in steps; 0, as when not given, for never.
    """

    coefficient: float = 1.0
    averaging_period: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
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


class StepAheadOptimizer(AheadOptimizer, Method):
    """The optimizer that `StepAhead` asks for; used as `AheadOptimizer` says.

    Gradients are clipped on each rank to the compressor's ``clip_norm``. When some rank's
    gradient is not finite, or the exchange fails, then x, all errors and all ranks' optimizers stay
    as they were before the step. A ``torch.amp.GradScaler`` may be used as always.
    """

    _exchange: Exchange | None
    _memory: dict[str, Any] | None
    _wrapping: Wrapping
    _settings: StepAhead
    _stepped: Flat
    _undo: Undo
    _scale: LossScale

    def __init__(self, wrapping: Wrapping, settings: StepAhead) -> None:
        super().__init__(wrapping.optimizer)
        trained = wrapping.trained
        ahead = _ByTheErrors(self, wrapping, settings.coefficient)
        self._look_ahead(ahead, trained)
        self._own(_wrapping=wrapping, _settings=settings, _stepped=ahead.flat.new(), _undo=Undo(wrapping.optimizer))
        self._own(_scale=LossScale(wrapping.wiring.grad_scaler))
        self._begin(None)

    def __new__(cls, wrapping: Any = None, *arguments: Any) -> StepAheadOptimizer:
        """Over the user's class."""
        return super().__new__(cls, wrapping.optimizer if isinstance(wrapping, Wrapping) else None)

    def _begin(self, memory: dict[str, Any] | None) -> None:
        self._own(_exchange=None, _memory=memory)
        watch(self, self._names)

    @property
    def exchange(self) -> Exchange:
        """The exchange, for its ``stats``; made on first use. Its memory's residual is e_i."""
        if self._exchange is None:
            compression, flat = self._wrapping.compression, self._ahead.flat
            device = self._ahead.synchronous.vector.device
            exchange = displacement_exchange(compression, flat.layout, self._wrapping.communicator(), device)
            inner = self.optimizer
            note = f"error_feedback={self._settings}"
            exchange.agree_on(f"optimizer={type(inner).__name__} {note} clip_norm={compression.clip_norm}")
            synchronous = self._ahead.synchronous.views
            named = {slot.name: view for slot, view in zip(flat.layout.slots, synchronous, strict=True)}
            exchange.watch(named, lambda: inner.param_groups)
            exchange.resync_every = self._wrapping.wiring.resync_every
            exchange.log.notes.append(note)
            if self._memory is not None:
                exchange.load_state_dict(self._memory)
            self._exchange = exchange
        made: Exchange = self._exchange
        return made

    def synchronize(self) -> None:
        """Refused: gradients are never exchanged, only steps are."""
        raise ConfigurationError(
            "with error_feedback the step itself is exchanged, so there are no averaged gradients to look at; "
            "to clip, set the compressor's clip_norm"
        )

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Nothing to set: gradients are not exchanged, and add up over any number of passes."""

    def shared_state(self) -> dict[str, Any]:
        """Parameters alone: the optimizer's state is this rank's own."""
        return {"parameters": {name: parameter.detach() for parameter, name in self._names.items()}}

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with another rank's `shared_state`."""
        with torch.no_grad():
            for parameter, name in self._names.items():
                parameter.copy_(state["parameters"][name])

    def flush(self) -> None:
        """Send everything in the next step; then the model alone is a checkpoint for any number of ranks."""
        self.exchange.flush()

    def memory_state_dict(self) -> dict[str, Any]:
        """A copy of what belongs to this rank alone: its error, and its optimizer's state (momentum is local)."""
        self.refuse_saving()
        return {"exchange": self.exchange.state_dict(), "optimizer": copy.deepcopy(super().state_dict())}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part, after ``load_state_dict``; see `Exchange.load_state_dict`."""
        self.exchange.load_state_dict(state["exchange"])
        self.optimizer.load_state_dict(state["optimizer"])

    def moves(self) -> bool:
        """Where there is anybody to exchange with, and a coefficient."""
        return self._settings.coefficient > 0.0 and self._is_active()

    def advance(self, **keywords: Any) -> None:
        """A step of the wrapped optimizer from x - a e, exchanged as how far it went."""
        if not self._is_active():
            self.optimizer.step(**keywords)
            return
        period = self._settings.averaging_period
        flat, limit = self._ahead.flat, self._wrapping.compression.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(flat.parameters, limit))
        exchange, start, taken = self.exchange, self._ahead.ahead, False
        self._undo.note()
        self._ahead.forth()
        flat.read(start)  # as the parameters' dtype has it
        if math.isfinite(norm):
            self.optimizer.step(**keywords)
            flat.read(self._stepped)
            exchange.submit_all(start.vector.sub_(self._stepped.vector))
        else:
            exchange.submit_all(start.vector.fill_(math.nan))
        try:
            exchange.run()
            taken = not exchange.void
        finally:
            if taken:
                self._ahead.synchronous.vector.sub_(exchange.update)
            else:
                self._undo.restore()
            self._ahead.back()
        if not taken:
            self._scale.tell(self)
        elif exchange.rounds.all_present and period and exchange.step % period == 0:
            exchange.average_memory()

    def restart(self) -> None:
        """Forget the errors."""
        self._memory = None
        if self._exchange is not None:
            self._exchange.reset()

    def _is_active(self) -> bool:
        return self._wrapping.wiring.is_active()

    def __getstate__(self) -> dict[str, Any]:
        """All but the exchange, of which the memory goes along."""
        memory = self._memory if self._exchange is None else self._exchange.state_dict()
        return {**super().__getstate__(), "_exchange": None, "_memory": memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin(state["_memory"])


class _ByTheErrors(Ahead):
    """Behind x by the errors, and of what this rank owns by its share."""

    def __init__(self, optimizer: StepAheadOptimizer, wrapping: Wrapping, coefficient: float) -> None:
        trained = wrapping.trained
        super().__init__(FlatParameters(trained, wrapping.layout, next(iter(trained.values())).device))
        self._optimizer, self._coefficient = optimizer, coefficient

    def point(self, ahead: Flat) -> None:
        """``x - a e``."""
        exchange = self._optimizer.exchange
        if not exchange.domain.is_models:
            read_errors(exchange, self._errors.vector)
            ahead.vector.sub_(self._errors.vector, alpha=self._coefficient)
            return
        residual, owned, others = exchange.memory.residual, exchange.owned, 1.0 - 1.0 / exchange.comm.size
        ahead.vector.sub_(residual, alpha=self._coefficient)
        ahead.vector[owned].add_(residual[owned], alpha=self._coefficient * others)

    @cached_property
    def _errors(self) -> Flat:
        return self.flat.new()
