"""What an exchange is made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum

Planner = Callable[[int, int], Any]
"""Sizes of a step's messages by step and number of ranks, equal on all ranks; None to send everything."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where an exchange takes place, and what holds for every algorithm alike.

    Attributes:
        layout: which coordinates belong to which parameter.
        comm: the ranks to exchange with; its size may change between steps.
        device: where gradients, memory and update live.
        plan: the sizes of each step.
        name: text that must be equal on all ranks, checked in the first step.
        label: what rank 0 calls the algorithm when it logs; nothing is logged without one.
        average: mean over ranks, or sum.
        clip_norm: a gradient of larger local norm is multiplied down to it before it enters the memory.
        momentum: momentum correction, or none.
        mixing: a transform of the tensors in which the exchange chooses, see `hvd_sketch.mixing`; None for none.
    """

    layout: Layout
    comm: Communicator
    device: torch.device
    plan: Planner
    name: str
    label: str = ""
    average: bool = True
    clip_norm: float | None = None
    momentum: Momentum | None = None
    mixing: str | None = None
