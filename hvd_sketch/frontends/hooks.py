"""The class that is put over the user's: Horovod's wrapper, with the exchange of a whole step at its heart."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.compatibility import without_momentum
from hvd_sketch.error_feedback.base import Follower
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.layout import describe_values
from hvd_sketch.memory import Momentum

ExchangeFactory = Callable[[dict[str, Tensor], Momentum | None], Exchange]

_SYNCHRONIZED_TWICE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). "
    "This can cause training slowdown. You may want to consider using optimizer.skip_synchronize() context "
    "if you use optimizer.synchronize() in your code."
)
_ZERO_GRAD_IN_FLIGHT = (
    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
    "optimizer.synchronize(). This is prohibited as it can cause a race condition."
)
_TOO_MANY_BACKWARDS = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). "
    "Increase backward_passes_per_step to accumulate gradients locally."
)
_PER_CLASS = ("__dict__", "__weakref__", "__annotations__", "__doc__")


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How a distributed optimizer is connected.

    Attributes:
        make_exchange: from the parameters that it trains and the momentum correction; called once, on first use.
        is_active: whether there is anybody to exchange with.
        backward_passes_per_step: local passes whose gradients are added up before an exchange.
        sparse_as_dense: turn sparse gradients into dense ones instead of refusing them.
        grad_scaler: the scaler in use, so that the memory holds unscaled gradients.
        correction: the momentum that is applied before the exchange in place of the optimizer's own.
        followers: attached to the exchange when it is made.
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


class ExchangingOptimizer(HorovodOptimizer):
    """What a distributed optimizer adds to the class of the optimizer it wraps.

    Never instantiated: `distribute` puts these methods into a new class, one level above the
    user's, as `hvd.broadcast_optimizer_state` requires. ``_base`` is the user's class.
    """

    _base: type[torch.optim.Optimizer]
    _wiring: Wiring
    _parameter_names: dict[Tensor, str]
    _requires_update: set[Tensor]
    _frozen: set[Tensor]
    _allreduce_delay: dict[Tensor, int]
    _handles: dict[Tensor, bool]
    _gathered: dict[int, Tensor]
    _scale: float | None
    _exchange: Exchange | None
    _positions: dict[Tensor, int]
    _group_of: dict[Tensor, dict[str, Any]]
    _synchronized: bool
    _should_synchronize: bool
    backward_passes_per_step: int

    @property
    def exchange(self) -> Exchange:
        """The exchange, for its ``stats``; made on first use, without communication."""
        if self._exchange is None:
            named = {name: p for p, name in self._parameter_names.items() if p in self._requires_update}
            self._exchange = self._wiring.make_exchange(named, self._wiring.correction)
            self._exchange.describe_values = partial(describe_values, named)
            for follower in self._wiring.followers:
                follower.attach(self._exchange)
            index = self._exchange.layout.index()
            self._positions = {parameter: index[name] for name, parameter in named.items()}
        return self._exchange

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accumulate so many backward passes (a sum, as in Horovod) before an exchange."""
        self.backward_passes_per_step = passes
        for parameter in self._allreduce_delay:
            self._allreduce_delay[parameter] = passes

    def synchronize(self) -> None:
        """Exchange the step's gradients; ``p.grad`` of every parameter then is the global update.

        A second call before `step` does nothing.
        """
        if self._synchronized or not self._wiring.is_active():
            self._synchronized = True
            return
        _check_frozen(self)
        for parameter in self._requires_update:
            if self._handles.get(parameter, False):
                continue
            if parameter.grad is None and self._wiring.correction is not None:
                parameter.grad = torch.zeros_like(parameter)  # weight decay goes on
            if parameter.grad is not None:
                _submit(self, parameter)
        try:
            if self._gathered:
                self.exchange.submit_many(self._gathered, 1.0 / _scale(self))
            self.exchange.run()
            _write_gradients(self)
        finally:
            self._handles.clear()
            self._gathered.clear()
            self._scale = None
            self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step` inside the block leave the gradients alone, after a `synchronize` by hand."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Exchange unless that was done, then step the wrapped optimizer.

        A closure is evaluated once, before the exchange, so that its gradients take part.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(_SYNCHRONIZED_TWICE, stacklevel=2)
            self.synchronize()
        self._synchronized = False
        if self._wiring.before_step is not None and self._wiring.is_active():
            self._wiring.before_step(self)
        with without_momentum(self, self._wiring.correction if self._wiring.is_active() else None):
            stepped = self._base.step(self)
        return loss if closure is not None else stepped

    step.hooked = True  # type: ignore[attr-defined]  # PyTorch would run step hooks here and again in the base

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; an error while some of them wait for the exchange."""
        if self._handles:
            raise AssertionError(_ZERO_GRAD_IN_FLIGHT)
        self._base.zero_grad(self, set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the vector's layout is fixed when the optimizer is wrapped."""
        raise ConfigurationError(
            "add_param_group after DistributedOptimizer: the new parameters would never be exchanged; "
            "add them to the plain optimizer first, then wrap it again"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state; the memory of unsent gradients starts empty.

        The memory belongs to one rank and has its own `memory_state_dict`.
        """
        self._handles.clear()
        self._gathered.clear()
        self._scale = None
        self._synchronized = False
        self._should_synchronize = True
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._base.load_state_dict(self, state_dict)
        self._group_of = _group_of(self)
        if self._exchange is not None:
            self._exchange.reset()

    def memory_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; save it on every rank, beside ``state_dict()``."""
        return self.exchange.state_dict()

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's memory, after ``load_state_dict``; see `Exchange.load_state_dict`."""
        self.exchange.load_state_dict(state)

    def flush(self) -> None:
        """Send everything in the next step, so that a checkpoint after it needs no memory."""
        self.exchange.flush()


def distribute(
    optimizer: torch.optim.Optimizer, named_parameters: list[tuple[str, Tensor]], wiring: Wiring
) -> ExchangingOptimizer:
    """A distributed optimizer of a class derived from ``type(optimizer)``, sharing its state.

    It is made without calling the class's constructor, so that optimizers with further required
    arguments work and state loaded before wrapping stays.

    Raises:
        ConfigurationError: for an optimizer that re-evaluates its closure.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(
            "LBFGS evaluates its closure several times a step, and only the first gradient would be exchanged; "
            "use an optimizer that steps once per gradient"
        )
    base = type(optimizer)
    methods = {name: value for name, value in vars(ExchangingOptimizer).items() if name not in _PER_CLASS}
    # broadcast_optimizer_state recognises distributed optimizers by this module's name
    cls: Any = type(base.__name__, (base,), {**methods, "__module__": "horovod.torch.optimizer", "_base": base})
    wrapped: Any = cls.__new__(cls)
    wrapped.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wrapped.__dict__.update(
        wiring.attributes,
        _wiring=wiring,
        _parameter_names={parameter: name for name, parameter in named_parameters},
        _requires_update={parameter for parameter in trained if parameter.requires_grad},
        _frozen={parameter for parameter in trained if not parameter.requires_grad},
        _allreduce_delay={parameter: wiring.backward_passes_per_step for _, parameter in named_parameters},
        _handles={},
        _gathered={},
        _scale=None,
        _exchange=None,
        _positions={},
        _group_of=_group_of(optimizer),
        _synchronized=False,
        _should_synchronize=True,
        backward_passes_per_step=wiring.backward_passes_per_step,
    )
    for parameter in wrapped._requires_update:
        parameter.register_post_accumulate_grad_hook(_gradient_hook(weakref.ref(wrapped)))
    distributed: ExchangingOptimizer = wrapped
    return distributed


def _group_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def _check_frozen(optimizer: Any) -> None:
    """Parameters that train on are those that trained when the optimizer was wrapped."""
    changed = {parameter for parameter in optimizer._requires_update if not parameter.requires_grad}
    changed |= {parameter for parameter in optimizer._frozen if parameter.requires_grad}
    for parameter in changed:
        optimizer.exchange.fail_together(
            f"parameter {optimizer._parameter_names[parameter]!r} was {'un' * parameter.requires_grad}frozen after it "
            "was given to DistributedOptimizer; do so on all ranks first, then wrap the plain optimizer again"
        )


def _gradient_hook(reference: weakref.ref[Any]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        optimizer = reference()
        if optimizer is None or not optimizer._wiring.is_active():
            return
        if optimizer._allreduce_delay[parameter] <= 0:
            raise AssertionError(_TOO_MANY_BACKWARDS)
        optimizer._allreduce_delay[parameter] -= 1
        optimizer._synchronized = False
        optimizer._handles[parameter] = optimizer._allreduce_delay[parameter] == 0
        if optimizer._handles[parameter]:
            _submit(optimizer, parameter)

    return hook


def _submit(optimizer: Any, parameter: Tensor) -> None:
    """Hand one gradient to the exchange, unscaled, with weight decay when we take it over."""
    exchange, gradient = optimizer.exchange, parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        if not optimizer._wiring.sparse_as_dense:
            exchange.fail_together(
                f"parameter {optimizer._parameter_names[parameter]!r} has a sparse gradient; "
                "pass sparse_as_dense=True, or give it an optimizer of its own"
            )
            return
        gradient = gradient.to_dense()
    position = optimizer._positions[parameter]
    decay = optimizer._group_of[parameter]["weight_decay"] if optimizer._wiring.correction is not None else 0.0
    decay /= 1 if exchange.average else exchange.comm.size
    if exchange.gathers and not decay:
        optimizer._gathered[position] = gradient
    else:
        exchange.submit(position, gradient, 1.0 / _scale(optimizer), parameter if decay else None, decay)


def _scale(optimizer: Any) -> float:
    """What the step's gradients are multiplied by; read once a step, for reading waits for the scaler's device."""
    if optimizer._scale is None:
        scaler = optimizer._wiring.grad_scaler
        optimizer._scale = 1.0 if scaler is None else scaler.get_scale()
    scale: float = optimizer._scale
    return scale


def _write_gradients(optimizer: Any) -> None:
    """Put the update into every gradient, in place, in the scaler's units and the parameter's strides."""
    exchange, scale = optimizer.exchange, _scale(optimizer)
    gradients = {}
    for parameter, position in optimizer._positions.items():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        elif parameter.grad.is_sparse:
            update = exchange.update_of(position) * scale
            parameter.grad = update.to_sparse(parameter.grad.sparse_dim()).to(parameter.dtype)
            continue
        gradients[position] = parameter.grad
    exchange.write_update(gradients, scale)
