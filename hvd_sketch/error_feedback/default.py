"""The error feedback that a script gets which does not ask for one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import stock
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.anticipate import Anticipate, Anticipation
from hvd_sketch.error_feedback.base import ErrorFeedback
from hvd_sketch.error_feedback.passes import Passes
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.common_share import CommonShare
from hvd_sketch.exchange.gradients import watches
from hvd_sketch.methods.flat import FlatParameters
from hvd_sketch.methods.wrapper import HOROVODS_MODULE

_KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class Default(Enum):
    """Stands for the error feedback that goes with a compressor and an optimizer."""

    OF_COMPRESSION = "of the compression"


def settle(
    compression: Any,
    optimizer: torch.optim.Optimizer,
    asked: ErrorFeedback | Default | None,
    *,
    averages: bool,
    corrects: bool,
) -> tuple[Any, ErrorFeedback | None]:
    """The compression, told whether gradients are anticipated, and the error feedback: as asked, or its own.

    A compressor's own is `Anticipate` if it `wants_anticipation`, for SGD, Adam and AdamW themselves, whose
    response to a gradient is known, where the ranks' gradients are averaged without momentum correction.

    Raises:
        ConfigurationError: when a compressor demands what is not possible.
    """
    if not isinstance(compression, Compressor):
        return compression, None if isinstance(asked, Default) else asked
    if isinstance(asked, Default):
        plain = averages and not corrects and compression.momentum is None
        possible = plain and _is_known(optimizer)
        if compression.anticipate and not possible:
            raise ConfigurationError(
                "anticipate=True needs torch.optim.SGD, Adam or AdamW (without amsgrad), op=Average and no momentum "
                f"correction, and this is {type(optimizer).__name__}; leave anticipate away to have it where possible"
            )
        asked = Anticipate() if possible and compression.wants_anticipation else None
    if isinstance(asked, Anticipate):
        asked = replace(asked, coefficient=asked.coefficient_of(optimizer))
    return replace(compression, anticipate=isinstance(asked, Anticipate)), asked


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its class, behind Horovod's, is one whose response is known: a subclass may step otherwise."""
    users = next(each for each in type(optimizer).__mro__ if each.__module__ != HOROVODS_MODULE)
    return users in _KNOWN and not any(group.get("amsgrad") for group in optimizer.param_groups)


def _accompany(
    compressor: stock.Compressing, optimizer: torch.optim.Optimizer, averages: bool
) -> tuple[stock.Compressing, stock.Follow]:
    """In stock Horovod, whose optimizers have nobody to wrap them."""
    settled, feedback = settle(compressor, optimizer, Default.OF_COMPRESSION, averages=averages, corrects=False)
    if not isinstance(feedback, Anticipate):
        return settled, stock.alone
    return settled, partial(follow, optimizer, feedback)


def follow(
    optimizer: torch.optim.Optimizer,
    feedback: Anticipate,
    client: Any,
    exchange: Exchange,
    named: Mapping[str, Tensor],
) -> Passes:
    """Anticipate for an optimizer that nobody wraps.

    Args:
        optimizer: the user's.
        feedback: how.
        client: who watches the parameters, see `hvd_sketch.exchange.gradients.watch`.
        exchange: of their gradients.
        named: the parameters.

    Returns:
        what keeps them ahead, to be told when a gradient is computed, and of every step.
    """
    exchange.log.notes.append(f"error_feedback={feedback}")
    exchange.agree_on(f"error_feedback={feedback}")
    shares, first = CommonShare(), next(iter(named.values()))
    shares.attach(exchange)
    flat = FlatParameters(named, exchange.layout, first.device)
    coefficient = feedback.coefficient_of(optimizer)
    ahead = Anticipation(weakref.proxy(optimizer), client.present_exchange, flat, shares, coefficient)
    living = weakref.ref(optimizer)

    def moves() -> bool:
        return living() is not None and exchange.step + exchange.stats.steps > 0 and watches(client, first)

    return Passes(ahead, {parameter: name for name, parameter in named.items()}, moves)


stock.accompany(_accompany)
