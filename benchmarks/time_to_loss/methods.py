"""What is compared: the baselines of the cluster's table, local SGD, and ours as dropped into a script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.cluster.methods import METHODS as OF_TABLE
from benchmarks.cluster.methods import Method
from benchmarks.cluster.trainings import Ddp, Horovod

_RATIO = 40.0
PERIOD = 40
"""Steps between two meetings of local SGD: as few bytes as at that ratio."""
_BASELINES = ("horovod", "horovod-fp16", "ddp", "ddp-powersgd-1", "ddp-powersgd-2", "ddp-powersgd-4")


class DroppedIn(Horovod):
    """The README's line for Horovod, with all of its defaults but for the settings given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("none")
        self._settings = {"ratio": _RATIO, **settings}

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import hvd_sketch

        distributed: Any = hvd_sketch.DistributedOptimizer(
            optimizer, model.named_parameters(), hvd_sketch.Compression.auto(**self._settings)
        )
        self._model, self.optimizer, self._step_bytes = model, distributed, 0.0
        self._stats = distributed.exchange.stats

    def bytes_sent(self) -> float:
        return float(self._stats.bytes_sent)


class DroppedIntoDdp(Ddp):
    """The README's line for DistributedDataParallel, with all of its defaults."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import hvd_sketch

        super().attach(model, optimizer)
        self._registered: Any = hvd_sketch.ddp.register(
            self._model, optimizer, hvd_sketch.Compression.auto(ratio=_RATIO)
        )

    def bytes_sent(self) -> float:
        return float(self._registered.exchange.stats.bytes_sent)


class DiLoCo(DroppedIn):
    """Local SGD with DiLoCo's outer momentum: whole models meet, in every `PERIOD` steps."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import hvd_sketch

        local: Any = hvd_sketch.LocalSGD(optimizer, model, period=PERIOD, outer_rate=0.7, outer_momentum=0.9)
        self._model, self.optimizer, self._step_bytes = model, local, 0.0
        self._stats = local.exchange.stats


METHODS: Mapping[str, Method] = {
    **{name: OF_TABLE[name] for name in _BASELINES},
    "diloco-40": Method(DiLoCo, warmup=PERIOD),
    "auto-40": Method(DroppedIn),
    "auto-40-warm-up": Method(lambda: DroppedIn(warmup_steps=100)),
    "ddp-auto-40": Method(DroppedIntoDdp, launcher="torchrun"),
}
