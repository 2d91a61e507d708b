"""Which inner optimizers go with which memory."""

from __future__ import annotations

import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.memory import Momentum


def check_momentum(momentum: Momentum | None, optimizer: torch.optim.Optimizer) -> None:
    """Refuse momentum before *and* after the exchange: it would be applied twice.

    Raises:
        ConfigurationError: naming the parameter group.
    """
    if momentum is None:
        return
    for number, group in enumerate(optimizer.param_groups):
        if group.get("momentum") or "betas" in group:
            raise ConfigurationError(
                f"momentum is applied before the exchange (factor {momentum.factor}) and again by parameter group "
                f"{number} of the inner optimizer; use an inner optimizer without momentum"
            )
