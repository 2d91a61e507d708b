"""Exchanges of how far an optimizer moved the parameters: errors in units of the update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hvd_sketch.comm import Communicator
from hvd_sketch.compressors import Compressor
from hvd_sketch.compressors.uncompressed import NoCompression
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import DenseExchange, Exchange
from hvd_sketch.layout import Layout
from hvd_sketch.methods.flat import LayoutRule, whole


def layout_rule(compression: Any) -> LayoutRule:
    """How a compression lays out the parameters.

    Raises:
        ConfigurationError: for what is neither ``Compression.none`` nor a compressor of ours, or
            has a momentum of its own: a displacement has the optimizer's in it already.
    """
    if compression is NoCompression:
        return whole
    if not isinstance(compression, Compressor):
        raise ConfigurationError(
            f"compression must be Compression.none, sketch(), topk() or another, got {compression!r}"
        )
    if compression.momentum is not None:
        raise ConfigurationError(
            "a compressor with momentum cannot exchange steps, which have the optimizer's momentum"
        )
    return compression.layout


def displacement_exchange(compression: Any, layout: Layout, comm: Communicator, device: torch.device) -> Exchange:
    """An exchange of means; nothing is clipped, because a displacement has a learning rate in it."""
    if isinstance(compression, Compressor):
        return replace(compression, clip_norm=None).exchange(layout, comm, average=True, device=device)
    return DenseExchange(layout, comm, average=True, device=device)
