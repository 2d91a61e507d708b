"""Training over slow networks with a fraction of the bytes: sketched gradients for Horovod and MPI.

``import hvd_sketch as hvd`` offers everything of ``horovod.torch``, with `Compression` and
`DistributedOptimizer` replaced by ours. Without Horovod the same names that a training script
needs (``init``, ``rank``, ``size``, ``broadcast_parameters`` …) work over mpi4py or in one process.
"""

from __future__ import annotations

import importlib
from typing import Any

from hvd_sketch.comm import Communicator, SingleProcess, has_horovod
from hvd_sketch.compression import Compression
from hvd_sketch.distributed import Average, DistributedOptimizer, Sum
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.memory import Momentum
from hvd_sketch.methods.anticipate import Anticipate
from hvd_sketch.methods.factored_moments import FactoredMoments
from hvd_sketch.methods.step_ahead import StepAhead
from hvd_sketch.sketch import CountSketch
from hvd_sketch.stats import Stats
from hvd_sketch.stock import exchange_of

__all__ = [
    "Anticipate",
    "Average",
    "Communicator",
    "Compression",
    "ConfigurationError",
    "CountSketch",
    "DistributedOptimizer",
    "FactoredMoments",
    "Momentum",
    "RankMismatchError",
    "SingleProcess",
    "Stats",
    "StepAhead",
    "Sum",
    "exchange_of",
]
__version__ = "0.1.0"

_METHODS = {
    "ADSAGA": "server",
    "Accordion": "accordion",
    "AccordionBatch": "accordion_batch",
    "AsyncSGD": "server",
    "CSER": "cser",
    "DecentLaM": "decentlam",
    "DmSGD": "decentlam",
    "EnergyTarget": "energy_target",
    "FedAT": "server",
    "Guard": "guard",
    "LEAD": "lead",
    "LocalSGD": "local_sgd",
    "OverlapLocalSGD": "overlap",
    "SwarmSGD": "swarm",
    "TensorTopK": "tensor_topk",
}


def __getattr__(name: str) -> Any:
    """Methods of their own modules, then names of ``horovod.torch``; each is imported when first used."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _METHODS:
        return getattr(importlib.import_module(f"hvd_sketch.methods.{_METHODS[name]}"), name)
    source = importlib.import_module("horovod.torch" if has_horovod() else "hvd_sketch.world")
    try:
        return getattr(source, name)
    except AttributeError:
        raise AttributeError(f"hvd_sketch has no attribute {name!r}, nor has {source.__name__}") from None
