"""What an error feedback is: two methods, one that refuses what it cannot serve, and one that wraps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.ahead import AheadOptimizer
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.methods.wiring import Wiring
from hvd_sketch.shards import local_parts


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """What an error feedback is given to wrap.

    Attributes:
        optimizer: the user's.
        named: its parameters, by name.
        compression: the compressor.
        communicator: the ranks; asked for when they are needed.
        wiring: how an `ExchangingOptimizer` would be connected, to build on where gradients are exchanged.
    """

    optimizer: torch.optim.Optimizer
    named: Sequence[tuple[str, Tensor]]
    compression: Compressor
    communicator: Callable[[], Communicator]
    wiring: Wiring

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that require a gradient, by name."""
        return {name: parameter for name, parameter in self.named if parameter.requires_grad}

    @property
    def layout(self) -> Layout:
        """Of these."""
        return self.compression.layout(local_parts(self.trained.items()))


class ErrorFeedback(ABC):
    """What ``DistributedOptimizer(…, error_feedback=…)`` takes: settings that wrap an optimizer."""

    @abstractmethod
    def check(self, optimizer: torch.optim.Optimizer, compression: Compressor) -> None:
        """Refuse what it cannot serve, before any communication.

        Raises:
            ConfigurationError: naming the argument and the remedy.
        """

    @abstractmethod
    def wrap(self, wrapping: Wrapping) -> AheadOptimizer:
        """The optimizer to train with."""


def check_error_feedback(
    error_feedback: ErrorFeedback,
    optimizer: torch.optim.Optimizer,
    compression: Any,
    *,
    averages: bool,
    corrects: bool,
) -> None:
    """Refuse what does not go with any error feedback, or with this one.

    Args:
        error_feedback: what the user gave.
        optimizer: the one to wrap.
        compression: what the user gave.
        averages: whether the ranks' gradients are averaged.
        corrects: whether momentum correction is asked for.

    Raises:
        ConfigurationError: naming the argument of ``DistributedOptimizer``.
    """
    if not isinstance(error_feedback, ErrorFeedback):
        raise ConfigurationError(
            f"error_feedback={error_feedback!r} is none: give an instance with its parentheses, as in "
            "error_feedback=hvd_sketch.Anticipate() or hvd_sketch.StepAhead(), or None"
        )
    problem = None
    if not isinstance(compression, Compressor):
        problem = f"needs a compressor with errors to step by, got {compression!r}"
    elif compression.momentum is not None or corrects:
        problem = "exchanges the wrapped optimizer's steps, momentum included; leave momentum correction away"
    elif not averages:
        problem = "averages the ranks' steps, which have a learning rate already; use op=Average"
    if problem is not None:
        raise ConfigurationError(f"error_feedback {problem}")
    error_feedback.check(optimizer, compression)
