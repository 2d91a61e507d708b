"""The methods that `compare_methods` compares, each with its share of the bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch.compressors import Sharded, Sparsifier, Stride
from hvd_sketch.compressors.tensor_topk import TensorTopK
from hvd_sketch.error_feedback.step_ahead import StepAhead
from hvd_sketch.methods.local.cser import CSER
from hvd_sketch.methods.local.local_sgd import LocalSGD
from hvd_sketch.schedules.accordion import Accordion


class _Everything:
    """Leaves nothing whole."""

    def is_dense(self, name: str, parameter: Tensor) -> bool:
        return False


class _Sharded(_Everything, Sharded):
    pass


class _Stride(_Everything, Stride):
    pass


class _TensorTopK(_Everything, TensorTopK):
    pass


COMPRESSORS: dict[str, type[Sparsifier]] = {"sharded": _Sharded, "stride": _Stride, "tensor": _TensorTopK}


class Setting(NamedTuple):
    """What a method needs to know: bytes are 1 / ratio of dense ones."""

    ratio: float
    steps: int
    compressor: str

    def compress(self, ratio: float, **settings: Any) -> Any:
        return COMPRESSORS[self.compressor](ratio=ratio, warmup_steps=0, clip_norm=None, **settings)


def feedback(optimizer: torch.optim.Optimizer, model: nn.Module, compressor: Any, settings: StepAhead) -> Any:
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compressor, error_feedback=settings)


def dense(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Local SGD that meets after every step: with a linear optimizer, plain data-parallel SGD."""
    return LocalSGD(optimizer, model, period=1)


def ef(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(setting.ratio), StepAhead(0.0, 0))


def ef_twice(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(setting.ratio / 2), StepAhead(0.0, 0))


def ef_half(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(2 * setting.ratio), StepAhead(0.0, 0))


def saef(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(setting.ratio), StepAhead(1.0, 0))


def saef_averaging(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Half of the bytes for steps, half for the averaging of errors."""
    return feedback(optimizer, model, setting.compress(2 * setting.ratio), StepAhead(1.0, int(2 * setting.ratio)))


def accordion(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Twice the bytes in critical regimes, half of them otherwise; twelve detections in a run."""
    low, high, epoch = setting.ratio / 2, 2 * setting.ratio, max(1, setting.steps // 12)
    schedule = Accordion(low, high, epoch, every=1, learning_rate=lambda: optimizer.param_groups[0]["lr"])
    return feedback(optimizer, model, setting.compress(setting.ratio, schedule=schedule), StepAhead(0.0, 0))


def cser(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Half of the bytes for steps, half for the reset of errors every 8 steps."""
    seed = {"seed": 1} if setting.compressor == "stride" else {}
    errors = setting.compress(setting.ratio / 4, **seed)
    return CSER(optimizer, model, gradients=setting.compress(2 * setting.ratio), errors=errors, period=8)


def local_sgd(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return LocalSGD(optimizer, model, compression=setting.compress(setting.ratio / 4), period=4)


METHODS = {
    "dense": dense,
    "EF": ef,
    "EF, twice the bytes": ef_twice,
    "EF, half the bytes": ef_half,
    "SAEF": saef,
    "SAEF + averaging": saef_averaging,
    "Accordion": accordion,
    "CSER": cser,
    "local SGD": local_sgd,
}
