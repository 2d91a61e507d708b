"""The gradients of an optimizer's parameters, on their way into an exchange and back."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hvd_sketch.exchange.base import Exchange
from hvd_sketch.shards import local


class Gradients:
    """Hands in what ``p.grad`` of every parameter is, and puts the update in its place.

    Where the exchange streams (buckets), a gradient is handed in when it is computed, and again if it has
    changed by the time of the step.

    Args:
        exchange: of these parameters.
        named: the parameters, by name.
        sparse_as_dense: hand sparse gradients in as dense ones, instead of reporting them.
        decay_of: the weight decay to add to a parameter's gradient; None for none.

    Attributes:
        parameters: in the layout's order.
    """

    def __init__(
        self,
        exchange: Exchange,
        named: Mapping[str, Tensor],
        *,
        sparse_as_dense: bool,
        decay_of: Callable[[Tensor], float] | None,
    ) -> None:
        self._exchange, self._sparse_as_dense, self._decay_of = exchange, sparse_as_dense, decay_of
        self.parameters = [named[slot.name] for slot in exchange.layout.slots]
        self._positions = {parameter: position for position, parameter in enumerate(self.parameters)}
        self._passes = [0] * len(self.parameters)
        self._left_out: set[int] = set()
        self._handed: dict[int, tuple[Tensor, int]] = {}
        """Of slots handed in during backward: the gradient, and the version that was."""
        self._factor = 1.0
        """By which those were multiplied."""

    def computed(self, parameter: Tensor, passes: int, scale_of: Callable[[], float | None]) -> None:
        """A gradient is there; the last of so many passes over the parameter hands it in, less the step's scale.

        While the scale is None all wait for the step.
        """
        position = self._positions[parameter]
        self._passes[position] += 1
        if self._passes[position] == passes and parameter.grad is not None:
            if not self._handed:
                scale = scale_of()
                if scale is None:
                    return
                self._factor = 1.0 / scale
            self._handed[position] = (parameter.grad, parameter.grad._version)
            self._hand_in({position: parameter.grad}, self._factor)

    def hand_in(self, factor: float) -> None:
        """Hand in ``factor`` times the gradients as they are now; a parameter without one counts as zero."""
        now = {at: p.grad for at, p in enumerate(self.parameters) if p.grad is not None and at not in self._left_out}
        self._exchange.frozen = [at for at, p in enumerate(self.parameters) if not p.requires_grad]
        for position in list(self._handed):
            if factor == self._factor and self._is_as_handed_in(position):
                del now[position]
            elif self._exchange.has_begun(position):
                changed = "changed" if factor == self._factor else f"scaled by {self._factor / factor:g}, or unscaled,"
                self._exchange.fail_together(
                    f"the gradient of {self._name(position)!r} was {changed} after backward() had handed it to a "
                    "bucket that is under way; change gradients after optimizer.synchronize(), pass grad_scaler=, use "
                    "the compressor's clip_norm, or leave buckets at 1"
                )
            else:
                self._exchange.take_back(position)
        self._hand_in(now, factor)
        self._hand_in_decay()

    def leave_out(self, parameter: Tensor) -> None:
        """In this step, count the gradient of a parameter as none."""
        self._left_out.add(self._positions[parameter])

    def forget(self) -> None:
        """The step is over."""
        self._handed.clear()
        self._left_out.clear()
        self._passes = [0] * len(self.parameters)

    @property
    def begun(self) -> bool:
        """Whether something was handed in during backward."""
        return bool(self._handed)

    def write(self, factor: float) -> None:
        """Put the update, times a factor, into every gradient in place, in the parameter's dtype and strides.

        A parameter that the step left alone keeps None.
        """
        targets, absent = {}, set(self._exchange.absent)
        for position, parameter in enumerate(self.parameters):
            if position in absent:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter, requires_grad=False)
            if parameter.grad.is_sparse:
                update = self._exchange.update_of(position) * factor
                parameter.grad = update.to_sparse(parameter.grad.sparse_dim()).to(parameter.dtype)
            else:
                targets[position] = local(parameter.grad)
        self._exchange.write_update(targets, factor)

    def there(self) -> Iterator[Tensor]:
        """The gradients that there are."""
        return (local(parameter.grad) for parameter in self.parameters if parameter.grad is not None)

    def _hand_in(self, gradients: Mapping[int, Tensor], factor: float) -> None:
        dense = {at: self._dense(at, gradient) for at, gradient in gradients.items()}
        fit = {at: gradient for at, gradient in dense.items() if gradient is not None}
        if self._decay_of is None:
            self._exchange.submit_many(fit, factor)
            return
        for position, gradient in fit.items():
            decay = self._decay_of(self.parameters[position])
            parameter = local(self.parameters[position]) if decay else None
            self._exchange.submit(position, gradient, factor, parameter, decay)

    def _hand_in_decay(self) -> None:
        """Of parameters without a gradient here, which others may have one for."""
        decays = (
            {at: self._decay_of(p) for at, p in enumerate(self.parameters) if p.grad is None} if self._decay_of else {}
        )
        self._exchange.only_decay = [position for position, decay in decays.items() if decay]
        for position in self._exchange.only_decay:
            parameter = local(self.parameters[position])
            self._exchange.submit(position, torch.zeros_like(parameter), 1.0, parameter, decays[position])

    def _dense(self, position: int, gradient: Tensor) -> Tensor | None:
        """The gradient, dense and of its slot's shape; None, and all ranks are told, if it cannot be."""
        if gradient.is_sparse and not self._sparse_as_dense:
            self._exchange.fail_together(
                f"parameter {self._name(position)!r} has a sparse gradient; "
                "pass sparse_as_dense=True, or give it an optimizer of its own"
            )
            return None
        gradient = gradient.detach().to_dense() if gradient.is_sparse else local(gradient.detach())
        shape = self._exchange.layout.slots[position].shape
        if tuple(gradient.shape) == shape:
            return gradient
        self._exchange.fail_together(
            f"the gradient of {self._name(position)!r} has the shape {tuple(gradient.shape)}, the parameter had "
            f"{shape} when the optimizer was wrapped; wrap the plain optimizer again after changing a model"
        )
        return None

    def _is_as_handed_in(self, position: int) -> bool:
        gradient, version = self._handed[position]
        return self.parameters[position].grad is gradient and gradient._version == version

    def _name(self, position: int) -> str:
        return self._exchange.layout.slots[position].name


def tell_unfrozen(exchange: Exchange, frozen: Mapping[str, Tensor], since: str) -> None:
    """Refuse a step, on all ranks, while a parameter trains that did not when something was wrapped.

    Args:
        exchange: which does not have it.
        frozen: parameters that did not train then, by name.
        since: when that was, and what to do.
    """
    for name, parameter in frozen.items():
        if parameter.requires_grad:
            exchange.fail_together(f"parameter {name!r} was unfrozen after {since}")


class Watcher(Protocol):
    """An optimizer that is told of gradients."""

    @property
    def exchange(self) -> Exchange: ...

    def gradient_computed(self, parameter: Tensor) -> None: ...

    def shared_state(self) -> dict[str, Any]:
        """Parameters, and whatever else is the same on all ranks."""

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with what `shared_state` gave on another rank."""


def shared_state(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What a `Watcher` gives of its parameters and their optimizer, not copied."""
    values = [parameter.detach() for parameter in parameters]
    return {"parameters": values, "optimizer": None if optimizer is None else optimizer.state_dict()}


@torch.no_grad()
def take_over(state: dict[str, Any], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Put what `shared_state` gave into these."""
    for parameter, value in zip(parameters, state["parameters"], strict=True):
        parameter.copy_(value)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


class _Watch(NamedTuple):
    """Who watches, and as the how manieth that began to; the same number on all ranks."""

    number: int
    watcher: weakref.ref[Any]


_watching = WeakIdKeyDictionary()
"""Who is told of a parameter's gradients: the optimizer that was made last."""

_numbers = itertools.count()


def watch(optimizer: Watcher, parameters: Iterable[Tensor]) -> None:
    """Tell an optimizer, while it lives and no other takes its place, of each gradient that backward computes."""
    watching = _Watch(next(_numbers), weakref.ref(optimizer))
    for parameter in parameters:
        _watching[parameter] = watching
        frozen = not parameter.requires_grad
        parameter.requires_grad_(True)  # PyTorch refuses hooks of a frozen one, which may train later
        parameter.register_post_accumulate_grad_hook(_hook_of(watching))
        parameter.requires_grad_(not frozen)


def watchers() -> dict[int, Watcher]:
    """The optimizers that are told of gradients, by their number."""
    found = {watching.number: watching.watcher() for watching in _watching.values()}
    return {number: found[number] for number in sorted(found) if found[number] is not None}


def watches(optimizer: Watcher, parameter: Tensor) -> bool:
    """Whether it is this optimizer that is told."""
    watching = _watching.get(parameter)
    return watching is not None and watching.watcher() is optimizer


def _hook_of(watching: _Watch) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        optimizer = watching.watcher()
        if optimizer is not None and _watching.get(parameter) is watching:
            optimizer.gradient_computed(parameter)

    return hook
