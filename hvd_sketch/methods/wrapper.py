"""What every method that steps a user's optimizer has in common with it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from hvd_sketch.errors import ConfigurationError


class WrappedOptimizer(torch.optim.Optimizer):
    """Is used like the optimizer that it wraps, learning-rate schedulers and gradient scalers included.

    A ``torch.amp.GradScaler`` calls `step` in every step on every rank: it leaves to the method what
    to do with a gradient that is not finite, and each rank's scale follows that rank's gradients.

    Raises:
        ConfigurationError: for an optimizer that re-evaluates its closure.
    """

    _step_supports_amp_scaling = (
        True  # else a scaler would skip a step, and with it the collectives, on one rank alone
    )

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError("LBFGS needs its closure several times a step; use an optimizer that steps once")
        self.__dict__.update({name: value for name, value in vars(optimizer).items() if name not in _OWN})
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One local step and what the method adds to it; a closure is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._unscale()
            self.advance()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the exchanged vector is fixed at construction."""
        raise ConfigurationError(f"add_param_group after {type(self).__name__}: add the parameters before wrapping")

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; it belongs to this rank."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state, and begin anew at the model's present parameters."""
        self.optimizer.load_state_dict(state_dict)
        self.restart()

    def _unscale(self) -> None:
        """Divide the gradients by the scale that a scaler left for this step."""
        scale = vars(self).get("grad_scale")
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, float(scale.double().reciprocal()))

    @abstractmethod
    def advance(self) -> None:
        """One step of the method, without gradient tracking."""

    def restart(self) -> None:
        """Forget the method's own state."""
        return


_OWN = ("step", "state", "param_groups")
