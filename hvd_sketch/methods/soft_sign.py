"""A normalised step for sparse updates, at a rate that follows from the user's own optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.settings import given_numbers

_STEPS = 9.0
_SMOOTHING = 0.95
_TINY = torch.finfo(torch.float32).tiny
_SIZE = "gradient_rms"
"""Of a group: the smoothed size of gradients, for SGD's rate."""


class SoftSign(torch.optim.Optimizer):
    """Steps by the soft sign of the gradient in place of the user's optimizer, with its schedule and weight decay.

    For ``DistributedOptimizer(SoftSign(optimizer), named, compression=Compression.mixed(ratio=400))``. With the
    gradient u of a tensor, which is then the decoded update, r the root mean square of its entries, l_t the user's
    learning rate and w its weight decay::

        d = gain u / (|u| + softness r)                   0 where r = 0
        x <- x (1 - l_t w) - rate_t d                     AdamW
        x <- x (1 - l_t w / (1 - m)) - rate_t d           SGD with momentum m

    The rate is nine times the root mean square step that the user's optimizer would take of uncorrelated
    gradients, so a learning rate that was tuned for it serves, and its schedule as well::

        rate_t = 9 l_t sqrt((1 - b1) / (1 + b1))          AdamW, Adam; b1 = 0.9: 2.06 l_t
        rate_t = 9 l_t (1 - a) s / sqrt(1 - m^2)          SGD with dampening a; s: the root mean square of all
                                                          entries of the step's gradient, smoothed at 0.95

    Nothing of the user's optimizer but its groups is used: not its step, nor its momentum or moments. A memory that
    decays, as that of `Compression.mixed`, is what there is of momentum. Where the memory is not sent whole, s is the
    size of what was sent, after the script's clipping. Sign steps: signSGD, Bernstein et al. (ICML 2018).

    Args:
        optimizer: `torch.optim.AdamW`, `Adam` without weight decay, or `SGD`; groups are shared with it, so that
            schedulers may hold either of the two.
        gain: of the step.
        softness: entries far below so many root mean squares step in proportion to their size, those far above
            all alike.

    Raises:
        ConfigurationError: for another optimizer, or numbers that are not above 0.
    """

    optimizer: torch.optim.Optimizer

    @given_numbers
    def __init__(self, optimizer: torch.optim.Optimizer, *, gain: float = 1.4, softness: float = 0.5) -> None:
        _check(optimizer)
        for name, value in (("gain", gain), ("softness", softness)):
            if not (value > 0.0 and math.isfinite(value)):
                raise ConfigurationError(f"SoftSign {name} must be above 0, got {value}")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.gain, self.softness = optimizer, gain, softness
        self._share()

    def _share(self) -> None:
        """Groups and state are the user's."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if isinstance(self.optimizer, torch.optim.SGD):
                self._measure()
            for group in self.param_groups:
                trained = [parameter for parameter in group["params"] if parameter.grad is not None]
                if trained:
                    self._step_group(group, trained)
        return loss

    def _measure(self) -> None:
        """The size of the step's gradients, into all groups."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        count = sum(gradient.numel() for gradient in gradients)
        now = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) / math.sqrt(count)
        for group in self.param_groups:
            last = group.get(_SIZE)
            group[_SIZE] = now if last is None else _SMOOTHING * last + (1.0 - _SMOOTHING) * now

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        rate, decay = _rates(group)
        scales = torch._foreach_norm(gradients)
        torch._foreach_mul_(scales, [self.softness / math.sqrt(max(1, each.numel())) for each in gradients])
        sizes = torch._foreach_abs(gradients)
        torch._foreach_add_(sizes, scales)
        torch._foreach_clamp_min_(sizes, _TINY)
        if decay:
            torch._foreach_mul_(parameters, 1.0 - decay)
        torch._foreach_addcdiv_(parameters, gradients, sizes, value=-self.gain * rate)

    def state_dict(self) -> dict[str, Any]:
        """The user's optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the user's optimizer's."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """With the user's optimizer, of which groups and state are."""
        own = {"optimizer": self.optimizer, "gain": self.gain, "softness": self.softness}
        return {**super().__getstate__(), **own}


def _rates(group: dict[str, Any]) -> tuple[float, float]:
    """Of a group's soft sign, and of its weight decay."""
    rate = -float(group["lr"]) if group.get("maximize") else float(group["lr"])
    decay = abs(rate) * group["weight_decay"]
    if "betas" in group:
        first = group["betas"][0]
        return _STEPS * rate * math.sqrt((1.0 - first) / (1.0 + first)), decay
    momentum = group["momentum"]
    size = (1.0 - group["dampening"]) * group[_SIZE] / math.sqrt(1.0 - momentum**2)
    return _STEPS * rate * size, decay / (1.0 - momentum)


def _check(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise ConfigurationError(
            f"SoftSign takes its rate from torch.optim.AdamW, Adam or SGD, not from {type(optimizer).__name__}; give "
            "it one of those, before DistributedOptimizer wraps it"
        )
    if type(optimizer) is torch.optim.Adam and any(group["weight_decay"] for group in optimizer.param_groups):
        raise ConfigurationError(
            "SoftSign: the weight decay of Adam is part of its gradient, which a sign would lose; use AdamW"
        )
