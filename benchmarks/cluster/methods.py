"""The methods that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cluster.trainings import Ddp, DdpHooked, Horovod, Mpi, Sparsified, Training


@dataclass(frozen=True)
class Method:
    """How a training run is started, and the steps it needs before its times are those of all later ones."""

    start: Callable[[], Training]
    warmup: int = 3
    launcher: str = "horovodrun"


def _ddp(start: Callable[[], Ddp], warmup: int = 3) -> Method:
    return Method(start, warmup, "torchrun")


def _mpi(compression: str = "none", **settings: Any) -> Method:
    return Method(lambda: Mpi(compression, **settings), launcher="mpirun")


_IN_TURN = {"in_turn": 0.75, "dense_below": 0}
"""The setting beside `hvd_sketch.Anticipate`; here without it, so that the rows differ in the exchange alone."""

METHODS: Mapping[str, Method] = {
    "horovod": Method(lambda: Horovod("none"), warmup=2),
    "horovod-fp16": Method(lambda: Horovod("fp16"), warmup=2),
    "topk-40": Method(lambda: Sparsified("topk", 40.0)),
    "sketch-10": Method(lambda: Sparsified("sketch", 10.0)),
    "sketch-40": Method(lambda: Sparsified("sketch", 40.0)),
    "sketch-40-4-buckets": Method(lambda: Sparsified("sketch", 40.0, buckets=4)),
    "sketch-40-in-turn": Method(lambda: Sparsified("sketch", 40.0, **_IN_TURN)),
    "sketch-40-in-turn-4-buckets": Method(lambda: Sparsified("sketch", 40.0, buckets=4, **_IN_TURN)),
    "sharded-40": Method(lambda: Sparsified("sharded", 40.0)),
    "sharded-40-4-buckets": Method(lambda: Sparsified("sharded", 40.0, buckets=4)),
    "mpi": _mpi(),
    "mpi-topk-40": _mpi("topk", ratio=40.0),
    "mpi-sketch-40": _mpi("sketch", ratio=40.0),
    "mpi-sharded-40": _mpi("sharded", ratio=40.0),
    "mpi-topk-40-flat": _mpi("topk", flat=True, ratio=40.0),
    "mpi-sketch-40-flat": _mpi("sketch", flat=True, ratio=40.0),
    "mpi-sharded-40-flat": _mpi("sharded", flat=True, ratio=40.0),
    "ddp": _ddp(lambda: Ddp(), warmup=2),
    "ddp-fp16": _ddp(lambda: DdpHooked("fp16"), warmup=2),
    "ddp-sketch-40": _ddp(lambda: DdpHooked("sketch", ratio=40.0)),
    "ddp-sketch-40-4-buckets": _ddp(lambda: DdpHooked("sketch", ratio=40.0, buckets=4)),
    "ddp-sharded-40": _ddp(lambda: DdpHooked("sharded", ratio=40.0)),
    "ddp-powersgd-1": _ddp(lambda: Ddp(1), warmup=4),
    "ddp-powersgd-2": _ddp(lambda: Ddp(2), warmup=4),
    "ddp-powersgd-4": _ddp(lambda: Ddp(4), warmup=4),
}
