"""Training over slow networks with a fraction of the bytes: sketched gradients for Horovod, torchrun and MPI.

``import hvd_sketch as hvd`` offers everything of ``horovod.torch``, with `Compression` and
`DistributedOptimizer` replaced by ours. Under torchrun, and without Horovod, the same names that a training
script needs (``init``, ``rank``, ``size``, ``broadcast_parameters`` …) work over torch.distributed, over
mpi4py, or in one process.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hvd_sketch.comm import Communicator, SingleProcess, chosen_backend
from hvd_sketch.compressors import Compression, TensorTopK
from hvd_sketch.error_feedback.anticipate import Anticipate
from hvd_sketch.error_feedback.factored_moments import FactoredMoments
from hvd_sketch.error_feedback.step_ahead import StepAhead
from hvd_sketch.errors import ConfigurationError, RankLostError, RankMismatchError
from hvd_sketch.frontends import elastic as _elastic  # noqa: F401 - it prepares Horovod
from hvd_sketch.frontends.arguments import Average, Sum
from hvd_sketch.frontends.checkpoint import SavedMemory
from hvd_sketch.frontends.join import join
from hvd_sketch.frontends.optimizer import DistributedOptimizer
from hvd_sketch.memory import Momentum
from hvd_sketch.methods.gossip.decentlam import DecentLaM, DmSGD
from hvd_sketch.methods.gossip.lead import LEAD
from hvd_sketch.methods.local.cser import CSER
from hvd_sketch.methods.local.local_sgd import LocalSGD
from hvd_sketch.methods.local.overlap import OverlapLocalSGD
from hvd_sketch.methods.server import ADSAGA, AsyncSGD, FedAT
from hvd_sketch.methods.soft_sign import SoftSign
from hvd_sketch.methods.swarm import SwarmSGD
from hvd_sketch.schedules.accordion import Accordion
from hvd_sketch.schedules.accordion_batch import AccordionBatch
from hvd_sketch.schedules.energy_target import EnergyTarget
from hvd_sketch.schedules.guard import Guard
from hvd_sketch.sketch import CountSketch
from hvd_sketch.stats import Stats
from hvd_sketch.stock import exchange_of
from hvd_sketch.version import VERSION

if TYPE_CHECKING:
    from hvd_sketch import ddp
    from hvd_sketch.frontends.collectives import allreduce
    from hvd_sketch.frontends.world import (
        broadcast_object,
        broadcast_optimizer_state,
        broadcast_parameters,
        init,
        is_initialized,
        local_rank,
        local_size,
        rank,
        shutdown,
        size,
    )

__all__ = [
    "ADSAGA",
    "CSER",
    "LEAD",
    "Accordion",
    "AccordionBatch",
    "Anticipate",
    "AsyncSGD",
    "Average",
    "Communicator",
    "Compression",
    "ConfigurationError",
    "CountSketch",
    "DecentLaM",
    "DistributedOptimizer",
    "DmSGD",
    "EnergyTarget",
    "FactoredMoments",
    "FedAT",
    "Guard",
    "LocalSGD",
    "Momentum",
    "OverlapLocalSGD",
    "RankLostError",
    "RankMismatchError",
    "SavedMemory",
    "SingleProcess",
    "SoftSign",
    "Stats",
    "StepAhead",
    "Sum",
    "SwarmSGD",
    "TensorTopK",
    "allreduce",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ddp",
    "exchange_of",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]
__version__ = VERSION
_OURS = {
    "broadcast_optimizer_state": "hvd_sketch.frontends.world",
    "broadcast_parameters": "hvd_sketch.frontends.with_horovod",
}
"""What Horovod has, and does for fewer models; where ours is."""

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Names of ``horovod.torch``, or of its stand-in, which is imported when the first of them is used."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "ddp":  # not every PyTorch has it
            return importlib.import_module("hvd_sketch.ddp")
        horovod = chosen_backend() == "horovod"
        if horovod and name in _OURS:
            return getattr(importlib.import_module(_OURS[name]), name)
        source = importlib.import_module("horovod.torch" if horovod else "hvd_sketch.frontends.without_horovod")
        try:
            return getattr(source, name)
        except AttributeError:
            raise AttributeError(f"hvd_sketch has no attribute {name!r}, nor has {source.__name__}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
