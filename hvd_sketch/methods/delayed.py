"""Gradients one step late: the exchange of a step's runs while the script computes the next one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.delayed import Delayed
from hvd_sketch.exchange.gradients import Gradients
from hvd_sketch.methods.exchanging import ExchangingOptimizer
from hvd_sketch.saved import unfit


class DelayedOptimizer(ExchangingOptimizer):
    """Applies in `step` what the step before has sent, and starts to exchange the gradients that are there.

    With g_i(t) the gradient that rank i computes at the model x(t), and c_i(t) what its compressor sends of that and
    of its memory::

        step t      x(t+1) = the wrapped optimizer's step from x(t) with mean_i c_i(t-1)
                    the exchange of g_i(t) begins; it runs while forward and backward of g_i(t+1) do

    so a step takes the longer of computing and exchanging in place of their sum, and at ratio 1 this is dense training
    with gradients one step late. What was sent, what is kept and what is in flight is what was computed. Before there
    is anything to apply the wrapped optimizer steps with all gradients None, and so it does after a step that was
    void, which is left out when its update would be applied: then scalers are told, on all ranks alike.

    The model is the same on all ranks, wherever a script looks at it, and lacks what is in flight until `finish`. An
    error of the exchange is raised by what waits for it next: `synchronize`, `step`, `finish`, or looking at
    `exchange`; the gradient that it was of is given up. Rates and momentum are those of the step that applies.

    ``synchronize()`` puts what is applied next into ``p.grad``; the exchange of what was there begins in `step`.
    """

    _flight: Delayed
    _handed_in: bool

    def _begin(self, memory: dict[str, Any] | None) -> None:
        super()._begin(memory)
        self._own(_handed_in=False)

    def _made(self) -> tuple[Exchange, Gradients]:
        if self._parts is None:
            exchange, _ = super()._made()
            exchange.agree_on("delayed=True")
            exchange.log.notes.append("gradients one step late")
            self._flight = Delayed(exchange)
        return super()._made()

    @property
    def exchange(self) -> Exchange:
        """The exchange, at rest: whoever looks at it waits for what is in flight."""
        exchange, _ = self._made()
        self._flight.wait()
        return exchange

    def step(self, closure: Callable[[], Any] | None = None, **keywords: Any) -> Any:
        """Apply what arrived, then start to exchange the gradients; a closure is evaluated once, before."""
        if not self._wiring.is_active():
            return super().step(closure, **keywords)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Of this step's gradients nobody knows yet; what is late is told by all alike.
        self._scale.tell(self, void=False)
        result = super().step(None, **keywords)
        if self._handed_in:
            self._start()
        return result if closure is None else loss

    step.hooked = True  # type: ignore[attr-defined]  # as in the class above

    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is in flight, on all ranks, after the last step; gradients are left as they are.

        A step of the wrapped optimizer, unless there is nothing to apply, or it was void.
        """
        if not self._wiring.is_active() or self._parts is None or not self._flight.pending:
            return
        exchange, gradients = self.exchange, self._parts[1]
        computed = [parameter.grad for parameter in gradients.parameters]
        for parameter in gradients.parameters:
            parameter.grad = None
        if not exchange.void:
            gradients.write(1.0)
            self._step_plainly(None, {})
        for parameter, gradient in zip(gradients.parameters, computed, strict=True):
            parameter.grad = gradient
        self._flight.settle()

    def restart(self) -> None:
        """As above, and what is in flight."""
        self._give_up()
        super().restart()

    def memory_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, and the update that was not applied yet, which is waited for."""
        state = super().memory_state_dict()
        return {**state, "delayed": self._flight.state_dict()}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; see `Exchange.load_state_dict`. Of a state without a delay nothing is in flight."""
        self._made()
        self._give_up()
        rest = {name: part for name, part in state.items() if name != "delayed"}
        delayed = state.get("delayed", _NOTHING)
        problem = unfit({"delayed": delayed}, {"delayed": self._flight.state_form()})
        if problem is not None:
            raise ConfigurationError(f"rank {self.exchange.comm.rank}: {problem}")
        super().load_memory_state_dict(rest)
        self._flight.load_state_dict(delayed)

    def gradient_computed(self, parameter: Tensor) -> None:
        """Called by backward: what was synchronized before it will not be stepped with."""
        self._own(_synchronized=False, _handed_in=False)

    def _run(self, scale: float, *, remember: bool = False) -> tuple[Exchange, Gradients]:
        """Hand the gradients in as they are, less their scale, and let go of them; what is held is the step before's.

        Until `step` nothing has come of it: they are handed in anew, or forgotten.
        """
        exchange, (_, gradients) = self.exchange, self._made()
        self._check_frozen(exchange)
        exchange.staging.forget()
        gradients.hand_in(1.0 / scale)
        gradients.forget()
        for position in exchange.absent:
            gradients.parameters[position].grad = None
        self._handed_in = True
        return exchange, gradients

    def _start(self) -> None:
        """What was held is applied, or void; now for the gradients that were handed in."""
        exchange, self._handed_in = self._made()[0], False
        self._flight.settle()
        with torch.no_grad():
            exchange.begin()
            self._note_in_flight(exchange)
        self._flight.start()

    def _note_in_flight(self, exchange: Exchange) -> None:
        """Look at the exchange once more before it runs; its gradient is this rank's."""

    def _step_plainly(self, closure: Callable[[], Any] | None, keywords: dict[str, Any]) -> Any:
        if self._handed_in and not self._flight.pending:
            for parameter in self._named.values():
                parameter.grad = None
        return super()._step_plainly(closure, keywords)

    def _throw_away(self) -> None:
        """Nothing of the gradients is in the exchange before it begins."""
        self._own(_synchronized=False, _handed_in=False)

    def _give_up(self) -> None:
        """Leave nothing in flight."""
        if self._parts is not None:
            self._flight.abandon()
        self._handed_in = False

    def __getstate__(self) -> dict[str, Any]:
        """All but what runs.

        Raises:
            ConfigurationError: while there is something in flight, which a copy would not have.
        """
        if self._parts is not None and self._flight.pending:
            raise ConfigurationError(
                "an optimizer with delayed=True is copied or pickled while a gradient is in flight, which the copy "
                "would not have; call optimizer.finish() on all ranks first, or save state_dict() and, on every "
                "rank, memory_state_dict()"
            )
        return {name: value for name, value in super().__getstate__().items() if name != "_flight"}


_NOTHING = {"update": None, "absent": None}
