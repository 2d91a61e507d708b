"""Training by one exchange of gradients a step: the optimizer that `DistributedOptimizer` puts over the user's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.compatibility import without_momentum
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.gradients import Gradients, shared_state, take_over, tell_unfrozen, watch
from hvd_sketch.exchange.scaling import LossScale
from hvd_sketch.methods.wiring import HorovodOptimizer, Wiring
from hvd_sketch.methods.wrapper import WrappedOptimizer

_SYNCHRONIZED_TWICE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). "
    "This can cause training slowdown. You may want to consider using optimizer.skip_synchronize() context "
    "if you use optimizer.synchronize() in your code."
)


class ExchangingOptimizer(WrappedOptimizer, HorovodOptimizer):
    """Exchanges in `step` what the gradients are then, and steps the user's optimizer with the result.

    Whatever is done to ``p.grad`` before that counts: clipping, scaling, replacing, None. Gradients that are
    thrown away, by `discard`, by ``zero_grad`` or by the next ``backward``, leave no trace. A void step, see
    `Exchange`, changes neither parameters nor state.

    Args:
        optimizer: the user's.
        named_parameters: its parameters, by name.
        wiring: how it is connected.
    """

    _wiring: Wiring
    _named: dict[str, Tensor]
    _frozen: dict[str, Tensor]
    _scale: LossScale
    _parts: tuple[Exchange, Gradients] | None
    _memory: dict[str, Any] | None
    _undo: Callable[[], None] | None
    _synchronized: bool
    _should_synchronize: bool
    backward_passes_per_step: int

    def __init__(
        self, optimizer: torch.optim.Optimizer, named_parameters: Sequence[tuple[str, Tensor]], wiring: Wiring
    ) -> None:
        super().__init__(optimizer)
        self._own(
            backward_passes_per_step=wiring.backward_passes_per_step,
            _wiring=wiring,
            _named={name: parameter for name, parameter in named_parameters if parameter.requires_grad},
            _frozen={name: parameter for name, parameter in named_parameters if not parameter.requires_grad},
            _scale=LossScale(wiring.grad_scaler),
            **wiring.attributes,
        )
        self._begin(None)

    def _begin(self, memory: dict[str, Any] | None) -> None:
        """With a saved memory, or none, and nothing handed in."""
        self._own(_parts=None, _memory=memory, _synchronized=False, _should_synchronize=True, _undo=None)
        watch(self, self._named.values())

    @property
    def exchange(self) -> Exchange:
        """The exchange, for its ``stats``; made on first use, without communication."""
        return self._made()[0]

    def _made(self) -> tuple[Exchange, Gradients]:
        """The exchange, and what hands gradients to it."""
        if self._parts is None:
            wiring = self._wiring
            exchange = wiring.make_exchange(self._named, wiring.correction)
            inner = self.optimizer
            exchange.watch(self._named, lambda: inner.param_groups)
            exchange.resync_every = wiring.resync_every
            exchange.agree_on(f"optimizer={type(inner).__name__} {wiring.note}")
            exchange.log.notes.append(wiring.note)
            for follower in wiring.followers:
                follower.attach(exchange)
            if self._memory is not None:
                exchange.load_state_dict(self._memory)
            decay_of = None if wiring.correction is None else self._decay_of
            dense = wiring.sparse_as_dense
            self._parts = exchange, Gradients(exchange, self._named, sparse_as_dense=dense, decay_of=decay_of)
        return self._parts

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Tell of so many backward passes before a step; gradients add up (a sum, as in Horovod) either way."""
        self.backward_passes_per_step = passes

    def synchronize(self) -> None:
        """Exchange the step's gradients; ``p.grad`` of every parameter then is the global update.

        It carries the loss scale that the gradients carried, and is not a number where the step is void.
        A parameter that no rank has a gradient for keeps None. A second call before `step` does nothing.
        """
        if self._synchronized or not self._wiring.is_active():
            self._synchronized = True
            return
        with torch.no_grad():
            scale = self._scale.by_hand(self)
            exchange, gradients = self._run(scale, remember=True)
            if exchange.void:
                for gradient in gradients.there():
                    gradient.fill_(math.nan)
            else:
                gradients.write(scale)
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step` inside the block leave the gradients alone, after a `synchronize` by hand."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None, **keywords: Any) -> Any:
        """Exchange unless that was done, then step the user's optimizer, with its own keywords.

        A closure is handed on; each of its evaluations is exchanged, and only the last one leaves traces.
        """
        if not self._wiring.is_active():
            return self._step_alone(closure, keywords)
        if closure is not None:
            return self._step_plainly(self._exchanging(closure), keywords)
        self._scale.note_step(self, by_hand=self._synchronized)
        void = False
        with torch.no_grad():
            if self._should_synchronize and not self._synchronized:
                exchange, gradients = self._run(self._scale.in_step(self))
                void = exchange.void
                if not void:
                    gradients.write(1.0)
            else:
                if self._should_synchronize:
                    warnings.warn(_SYNCHRONIZED_TWICE, stacklevel=3)
                self._unscale()
                void = self.exchange.void and not all(bool(g.isfinite().all()) for g in self._made()[1].there())
        self._own(_synchronized=False, _undo=None)
        if void:
            self._scale.tell(self)
            return None
        return self._step_plainly(None, keywords)

    step.hooked = True  # type: ignore[attr-defined]  # PyTorch would run step hooks here and again in the base

    def discard(self) -> None:
        """Throw the gradients away that were computed, synchronized or not; nothing of them is kept anywhere."""
        self._throw_away()
        super().discard()

    def zero_grad(self, *arguments: Any, **keywords: Any) -> None:
        """Clear the gradients; what was synchronized and not stepped with is as if it had never been."""
        self._throw_away()
        self.optimizer.zero_grad(*arguments, **keywords)

    def restart(self) -> None:
        """Forget the memory of unsent gradients, unless it was just loaded: it belongs to one rank."""
        if self._parts is not None and self._parts[0].is_as_loaded:
            return
        self._own(_synchronized=False, _should_synchronize=True, _undo=None, _memory=None)
        if self._parts is not None:
            self._parts[0].reset()
            self._parts[1].forget()

    def memory_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; save it on every rank, beside ``state_dict()``."""
        return self.exchange.state_dict()

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's memory, before or after ``load_state_dict``; see `Exchange.load_state_dict`."""
        self.exchange.load_state_dict(state)

    def shared_state(self) -> dict[str, Any]:
        """Parameters and the optimizer's state, the same on all ranks; not copied."""
        return shared_state(list(self._named.values()), self.optimizer)

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with another rank's `shared_state`; what is unsent here stays."""
        take_over(state, list(self._named.values()), self.optimizer)

    def flush(self) -> None:
        """Send everything in the next step, so that a checkpoint after it needs no memory."""
        self.exchange.flush()

    def gradient_computed(self, parameter: Tensor) -> None:
        """Called by backward: what was synchronized before it will not be stepped with."""
        if not self._wiring.is_active():
            return
        self._synchronized = False
        exchange, gradients = self._made()
        if exchange.streams:
            with torch.no_grad():
                gradients.computed(parameter, self.backward_passes_per_step, lambda: self._scale.in_backward(self))

    def _run(self, scale: float, *, remember: bool = False) -> tuple[Exchange, Gradients]:
        """Exchange the gradients as they are, less their scale."""
        exchange, gradients = self._made()
        self._take_back()
        self._undo = exchange.snapshot() if remember else None
        self._check_frozen(exchange)
        gradients.hand_in(1.0 / scale)
        try:
            exchange.run()
        finally:
            gradients.forget()
        return exchange, gradients

    def _take_back(self) -> None:
        """Undo what was synchronized and not stepped with."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _throw_away(self) -> None:
        """Leave nothing of the gradients in the exchange; of those under way, in a step that is void for all."""
        self._take_back()
        self._synchronized = False
        if self._parts is not None:
            exchange, gradients = self._parts
            if gradients.begun:
                exchange.run_void()
            gradients.forget()

    def _exchanging(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure whose gradients are exchanged; each evaluation is as if it were the only one."""
        before: list[Callable[[], None]] = []

        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            if before:
                before.pop()()
            before.append(self.exchange.snapshot())
            with torch.no_grad():
                exchange, gradients = self._run(1.0)
                if exchange.void:
                    for parameter in self._named.values():
                        parameter.grad = None
                else:
                    gradients.write(1.0)
            return loss

        return evaluate

    def _step_plainly(self, closure: Callable[[], Any] | None, keywords: dict[str, Any]) -> Any:
        """A step of the user's optimizer on the update."""
        if self._wiring.before_step is not None:
            self._wiring.before_step(self)
        with without_momentum(self, self._wiring.correction):
            return self.optimizer.step(**keywords) if closure is None else self.optimizer.step(closure, **keywords)

    def _step_alone(self, closure: Callable[[], Any] | None, keywords: dict[str, Any]) -> Any:
        """A step of a single process."""
        self._synchronized = False
        if float(self.__dict__.get("found_inf", 0.0)):
            return None
        with torch.no_grad():
            self._unscale()
        return self.optimizer.step(**keywords) if closure is None else self.optimizer.step(closure, **keywords)

    def _decay_of(self, parameter: Tensor) -> float:
        """The weight decay of a parameter, of which every rank adds its share."""
        groups = (group for group in self.param_groups if any(parameter is member for member in group["params"]))
        decay = float(next(groups)["weight_decay"])
        return decay if self.exchange.average else decay / self.exchange.comm.size

    def _check_frozen(self, exchange: Exchange) -> None:
        """Parameters that train are among those that trained when the optimizer was wrapped."""
        told = "it was given to DistributedOptimizer; do so on all ranks first, then wrap the plain optimizer again"
        tell_unfrozen(exchange, self._frozen, told)

    def __getstate__(self) -> dict[str, Any]:
        """All but the exchange, of which the memory goes along."""
        memory = self._memory if self._parts is None else self._parts[0].state_dict()
        state = {**super().__getstate__(), "_memory": memory}
        return {name: value for name, value in state.items() if name not in ("_parts", "_undo")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin(state["_memory"])
