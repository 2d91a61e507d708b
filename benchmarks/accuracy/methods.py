"""The methods compared: what each makes of a rank's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import hvd_sketch
from benchmarks.accuracy.rivals import DeMo, SparseLoCo
from hvd_sketch import Anticipate, Compression, FactoredMoments
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.hosts import Asked
from hvd_sketch.error_feedback.default import Default

Wrap = Callable[[torch.optim.Optimizer, nn.Module, Communicator], Any]
"""Makes the distributed optimizer of one rank."""

LOCAL_PERIOD = 8

ANTICIPATE = Anticipate(coefficient=0.6)
"""The default with SGD, and with Adam when the rows by hand were measured."""


def exchanged(
    compression: Any,
    error_feedback: Anticipate | Default | None = None,
    hierarchical: Asked = None,
    *,
    delayed: bool = False,
) -> Wrap:
    """Gradients are exchanged in every step, by ranks or by hosts, and applied there or a step late."""

    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, comm: Communicator) -> Any:
        return hvd_sketch.DistributedOptimizer(
            optimizer,
            model.named_parameters(),
            compression,
            comm=comm,
            error_feedback=error_feedback,
            hierarchical=hierarchical,
            delayed=delayed,
        )

    return wrap


def local(ratio: float, period: int, anticipate: float = 0.0) -> Wrap:
    """Models are exchanged after every ``period`` steps, at so much less of a ratio."""
    compression = Compression.sharded(ratio=ratio / period, warmup_steps=0, clip_norm=None)

    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, comm: Communicator) -> Any:
        return hvd_sketch.LocalSGD(
            optimizer, model, comm, compression=compression, period=period, anticipate=anticipate
        )

    return wrap


def dropped_in(compression: Any) -> Wrap:
    """The one argument that a script gets, and whatever comes with it."""
    return exchanged(compression, Default.OF_COMPRESSION)


DENSE = exchanged(Compression.none)

FACTORED = "sharded, anticipate, factored"
"""For Adam alone; with SGD it would be the line above."""

METHODS: dict[str, Callable[[float], Wrap]] = {
    "sketch": lambda ratio: exchanged(Compression.sketch(ratio=ratio, warmup_steps=0)),
    "sketch, anticipate": lambda ratio: exchanged(
        Compression.sketch(ratio=ratio, warmup_steps=0, in_turn=0.75, dense_below=0), ANTICIPATE
    ),
    "topk": lambda ratio: exchanged(Compression.topk(ratio=ratio, warmup_steps=0)),
    "topk, anticipate": lambda ratio: exchanged(
        Compression.topk(ratio=ratio, warmup_steps=0, dense_below=0), ANTICIPATE
    ),
    "sharded": lambda ratio: exchanged(Compression.sharded(ratio=ratio, warmup_steps=0)),
    "sharded, anticipate": lambda ratio: exchanged(Compression.sharded(ratio=ratio, warmup_steps=0), ANTICIPATE),
    FACTORED: lambda ratio: exchanged(
        Compression.sharded(ratio=ratio, warmup_steps=0), replace(ANTICIPATE, second_moments=FactoredMoments())
    ),
    "local SGD": lambda ratio: local(ratio, LOCAL_PERIOD),
    "local SGD, 4 steps": lambda ratio: local(ratio, 4),
    "local SGD, 4 steps, anticipate": lambda ratio: local(ratio, 4, anticipate=0.6),
}
"""By name, of the ratio; none has dense steps at first, so that the ratio is that of the whole run."""


def soft_sign(compression: Any) -> Wrap:
    """The step of the recipe."""

    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, comm: Communicator) -> Any:
        return exchanged(compression)(hvd_sketch.SoftSign(optimizer), model, comm)

    return wrap


NORMALISED: dict[str, Callable[[float], Wrap]] = {
    "soft sign, uncompressed": lambda ratio: soft_sign(Compression.none),
    "soft sign, mixed by dct": lambda ratio: soft_sign(Compression.mixed(ratio=ratio, mixing="dct")),
    "soft sign, mixed by hadamard": lambda ratio: soft_sign(Compression.mixed(ratio=ratio, mixing="hadamard")),
    "sharded, anticipate, mixed by dct": lambda ratio: exchanged(
        Compression.sharded(ratio=ratio, warmup_steps=0, mixing="dct"), ANTICIPATE
    ),
    "sharded, anticipate, mixed by hadamard": lambda ratio: exchanged(
        Compression.sharded(ratio=ratio, warmup_steps=0, mixing="hadamard"), ANTICIPATE
    ),
    "sketch, anticipate, mixed by dct": lambda ratio: exchanged(
        Compression.sketch(ratio=ratio, warmup_steps=0, in_turn=0.75, dense_below=0, mixing="dct"), ANTICIPATE
    ),
    "sketch, soft sign, mixed by hadamard": lambda ratio: soft_sign(
        Compression.sketch(
            ratio=ratio,
            warmup_steps=0,
            table_share=0.2,
            dense_below=0,
            clip_norm=None,
            anticipate=False,
            mixing="hadamard",
            tensor_power=0.7,
            decay=0.99,
        )
    ),
}
"""By name, of the ratio: coefficients in place of entries, and a step to go with them."""

RIVALS: dict[str, Callable[[float], Wrap]] = {
    "DeMo": lambda ratio: lambda optimizer, model, comm: DeMo(optimizer, comm, ratio),
    "SparseLoCo, 8 steps": lambda ratio: lambda optimizer, model, comm: SparseLoCo(optimizer, comm, ratio, 8),
}
"""By name, of the ratio: of others, see `benchmarks.accuracy.rivals`."""

LOW_RANK: dict[str, Callable[[float], Wrap]] = {
    "powersgd": lambda rank: exchanged(Compression.powersgd(rank=int(rank), start_step=0)),
    "powersgd, anticipate": lambda rank: exchanged(Compression.powersgd(rank=int(rank), start_step=0), ANTICIPATE),
}
"""By name, of PowerSGD's rank; the ratio follows from it, and rows carry the one that came out."""
LOW_RANKS = (8.0, 4.0, 2.0, 1.0)


DROPPED_IN: dict[str, Callable[[float], Wrap]] = {
    "auto, dropped in": lambda ratio: dropped_in(Compression.auto(ratio=ratio)),
    "sketch, dropped in": lambda ratio: dropped_in(Compression.sketch(ratio=ratio)),
    "topk, dropped in": lambda ratio: dropped_in(Compression.topk(ratio=ratio)),
}
"""By name, of the ratio: what one argument brings."""

BY_RATIO = DROPPED_IN | METHODS | NORMALISED | RIVALS


def make(method: str, setting: float) -> Wrap:
    """The method of that name at a ratio, or at a rank for PowerSGD."""
    if method == "dense":
        return DENSE
    return (BY_RATIO | LOW_RANK)[method](setting)


def way_of(method: str) -> str:
    """Whether a script gets it by one argument, or by more."""
    return "dropped in" if method in DROPPED_IN else "by hand"


def suits(method: str, task: str) -> bool:
    """Whether a task's optimizer is one that a method knows; DeMo's steps are signs, at a rate as Adam's."""
    return method not in (FACTORED, "DeMo") or task.endswith("adamw")
