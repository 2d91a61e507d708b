"""Loss scales of mixed precision: which one the gradients carry, and telling scalers of a step that was void."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import torch
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState

from hvd_sketch.instances import instances_of

_SEVERAL = (
    "hvd_sketch: several GradScalers are in use, and which one scaled an optimizer's gradients cannot be told before "
    "scaler.step(): they are taken to be unscaled, so what is kept of them has the scale in it; pass grad_scaler= to "
    "hvd_sketch.DistributedOptimizer"
)

_NOT_THEIRS = (
    "hvd_sketch: gradients were synchronized by hand before a first step could tell whether the GradScaler in use is "
    "theirs. It is not: they were taken to carry its scale, and what is kept of this one step, and what the "
    "compressor's clip_norm saw, is too small by it. Pass grad_scaler= to hvd_sketch.DistributedOptimizer; "
    "torch.amp.GradScaler(enabled=False) for an optimizer without one"
)


class LossScale:
    """The scale that an optimizer's gradients carry when they are exchanged, and whom to tell of void steps.

    Inside ``scaler.step(optimizer)`` the scaler tells it. Before that, when gradients are synchronized by
    hand, it is that of the scaler that was given, or else of the only one in use, unless
    ``scaler.unscale_(optimizer)`` has been called. That one is looked for once, at the first time; of several, none
    is taken, with a warning.

    A scaler that is not for these gradients is told from one that is by the first step, see `settle`. Inside
    ``scaler.step(optimizer)`` the scaler has a state of that optimizer, by which `tell` knows it.
    """

    def __init__(self, scaler: GradScaler | None) -> None:
        self._told = None if scaler is None else weakref.ref(scaler)
        self._found: weakref.ref[GradScaler] | None = None
        self._stepping: weakref.ref[GradScaler] | None = None
        self._looked = False
        self._scaler_steps: bool | None = None
        """Whether a scaler called the last step; None before the first."""

    def __reduce__(self) -> Any:
        return LossScale, (None,)

    def in_backward(self, optimizer: torch.optim.Optimizer) -> float | None:
        """While gradients are computed; None if a scaler is in use, and no step has told yet whether for these."""
        scale = self.by_hand(optimizer)
        unknown = self._told is None and self._scaler_steps is None and self._found is not None
        return None if unknown else scale

    def note_step(self, optimizer: torch.optim.Optimizer, *, by_hand: bool) -> None:
        """Take note, in `step`, of whether a scaler calls it or has unscaled the gradients, and warn of a wrong guess.

        Args:
            optimizer: the one that steps.
            by_hand: whether its gradients were synchronized before.
        """
        scaler = None if self._found is None else self._found()
        state = None if scaler is None else _state_of(scaler, optimizer)
        unscaled = state is not None and state["stage"] is OptState.UNSCALED
        scaled = "found_inf" in vars(optimizer) or unscaled
        if by_hand and self.is_guessed and not scaled and _scale_of(scaler, optimizer) != 1.0:
            warnings.warn(_NOT_THEIRS, stacklevel=4)
        self._scaler_steps = scaled

    @property
    def is_guessed(self) -> bool:
        """Whether it is the only scaler's, and no step has told yet whether that one is for these gradients."""
        return self._told is None and self._found is not None and self._scaler_steps is None

    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        """Take note, as a step begins of an optimizer that nobody wraps, of whether the scaler calls it.

        It has unscaled the gradients before, perhaps of another one around it, or has left that to a fused step.
        """
        if self.is_guessed:
            scaler = self._found and self._found()
            states = scaler._per_optimizer_states.values() if scaler else ()
            unscaled = any(state["stage"] is OptState.UNSCALED for state in states)
            self._scaler_steps = unscaled or "found_inf" in vars(optimizer)

    def in_step(self, optimizer: torch.optim.Optimizer) -> float:
        """Inside `step`: what the scaler that calls it, if one does, left on the optimizer."""
        left = vars(optimizer)
        if "found_inf" in left:
            return 1.0 if left["grad_scale"] is None else float(left["grad_scale"])
        return _scale_of(None if self._told is None else self._told(), optimizer)

    def by_hand(self, optimizer: torch.optim.Optimizer) -> float:
        """Outside of it."""
        if self._told is None and self._scaler_steps is False:
            return 1.0
        if self._told is None and not self._looked:
            used = _scalers_in_use()
            self._found, self._looked = weakref.ref(used[0]) if len(used) == 1 else None, True
            if len(used) > 1:
                warnings.warn(_SEVERAL, stacklevel=2)
        known = self._told or self._found
        return _scale_of(None if known is None else known(), optimizer)

    def tell(self, optimizer: torch.optim.Optimizer, *, void: bool = True) -> None:
        """Make the scaler that steps this optimizer, if one does, lower its scale or not, whatever gradients here are.

        Args:
            optimizer: the one that the scaler was given.
            void: lower it.
        """
        for state in self._states_of(optimizer) if "found_inf" in vars(optimizer) else ():
            for found in state["found_inf_per_device"].values():
                found.fill_(float(void))

    def _states_of(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """What scalers know of it in this step; those that are known are asked first, for to search takes long."""
        for known in (self._stepping, self._told, self._found):
            scaler = None if known is None else known()
            state = None if scaler is None else _state_of(scaler, optimizer)
            if state is not None:
                return [state]
        asked = [(scaler, _state_of(scaler, optimizer)) for scaler in instances_of(GradScaler)]
        knowing = [(scaler, state) for scaler, state in asked if state is not None]
        if len(knowing) == 1:
            self._stepping = weakref.ref(knowing[0][0])
        return [state for _, state in knowing]


def _scale_of(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> float:
    """What gradients that backward computed from ``scaler.scale(loss)`` carry, unless they were unscaled."""
    if scaler is None or not scaler.is_enabled() or scaler._scale is None:
        return 1.0
    state = _state_of(scaler, optimizer)
    return 1.0 if state is not None and state["stage"] is not OptState.READY else float(scaler.get_scale())


def _scalers_in_use() -> list[GradScaler]:
    """Those that have scaled something."""
    for clears_up in (False, True):
        if clears_up:
            gc.collect()
        used = [scaler for scaler in instances_of(GradScaler) if scaler.is_enabled() and scaler._scale is not None]
        if len(used) <= 1:
            break
    return used


def _state_of(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """What a scaler knows of an optimizer in this step."""
    if not scaler.is_enabled():
        return None
    states: dict[int, dict[str, Any]] = scaler._per_optimizer_states
    return states.get(id(optimizer))
