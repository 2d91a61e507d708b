"""The one table of methods, over which every law of them runs: a new one is tested by a line here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch import Anticipate, Compression, FactoredMoments, StepAhead
from hvd_sketch.comm import Communicator
from tests.support.training import flat, loss, net

PLAIN: dict[str, Any] = {"warmup_steps": 0, "dense_below": 100}
SHARDED, STRIDE = Compression.sharded(ratio=8.0, **PLAIN), Compression.stride(ratio=8.0, **PLAIN)
SKETCH, TOPK = Compression.sketch(ratio=8.0, **PLAIN), Compression.topk(ratio=8.0, **PLAIN)


def everything() -> Any:
    """A compressor that sends all in every step."""
    return Compression.sharded(schedule=lambda step: 1.0, clip_norm=None)


class Method(NamedTuple):
    """How it is made.

    Attributes:
        make: from the user's optimizer, the model and the ranks.
        optimizer: of the parameters.
        dense: the same at settings with which it must equal dense training, if there are any.
    """

    make: Callable[[torch.optim.Optimizer, nn.Module, Communicator], Any]
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(
        parameters, 0.05, momentum=0.9
    )
    dense: Callable[[torch.optim.Optimizer, nn.Module, Communicator], Any] | None = None


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 3e-3)


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05)


def exchanging(compression: Any, feedback: Any = None) -> Callable[..., Any]:
    """`DistributedOptimizer` with an error feedback."""
    return lambda inner, model, comm: hvd.DistributedOptimizer(
        inner, model.named_parameters(), compression, comm=comm, error_feedback=feedback
    )


def meeting(method: Any, **settings: Any) -> Callable[..., Any]:
    """A method that is given the model."""
    return lambda inner, model, comm: method(inner, model, comm, **settings)


METHODS: dict[str, Method] = {
    "exchange": Method(exchanging(SHARDED), dense=exchanging(everything())),
    "anticipate": Method(exchanging(SHARDED, Anticipate()), dense=exchanging(everything(), Anticipate())),
    "anticipate, adamw": Method(exchanging(SKETCH, Anticipate()), adamw, exchanging(everything(), Anticipate())),
    "anticipate, factored": Method(exchanging(SHARDED, Anticipate(second_moments=FactoredMoments())), adamw),
    "step ahead": Method(exchanging(SHARDED, StepAhead()), dense=exchanging(everything(), StepAhead())),
    "step ahead by half": Method(exchanging(TOPK, StepAhead(0.5, 3)), adamw),
    "local sgd": Method(
        meeting(hvd.LocalSGD, compression=SHARDED, period=3),
        plain_sgd,
        meeting(hvd.LocalSGD, compression=Compression.none, period=1),
    ),
    "local sgd, slowmo": Method(
        meeting(hvd.LocalSGD, compression=SKETCH, period=3, outer_momentum=0.3, nesterov=False, momentum_sync="reset")
    ),
    "local sgd, diloco": Method(
        meeting(hvd.LocalSGD, compression=TOPK, period=3, outer_momentum=0.3, momentum_sync="average"), adamw
    ),
    "local sgd, anticipating": Method(meeting(hvd.LocalSGD, compression=SHARDED, period=3, anticipate=0.6), adamw),
    "overlap": Method(meeting(hvd.OverlapLocalSGD, period=3)),
    "cser": Method(
        meeting(hvd.CSER, gradients=STRIDE, errors=SHARDED, period=3),
        dense=meeting(hvd.CSER, gradients=Compression.none, errors=Compression.none, period=3),
    ),
    "cser, partial": Method(meeting(hvd.CSER, gradients=None, errors=STRIDE, period=3)),
    "dmsgd": Method(meeting(hvd.DmSGD)),
    "decentlam": Method(meeting(hvd.DecentLaM)),
    "lead": Method(meeting(hvd.LEAD), plain_sgd),
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
EXACT = {name: method for name, method in METHODS.items() if method.dense is not None}


def train(
    optimizer: Any, model: nn.Module, rank: int, steps: range, spoil: Callable[[int], bool] = lambda step: False
) -> None:
    """Steps as the method wants them; where ``spoil`` says so, a gradient becomes a NaN."""
    for step in steps:
        optimizer.zero_grad()
        with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
            loss(model, rank, step).backward()
        if spoil(step):
            next(parameter.grad for parameter in model.parameters() if parameter.grad is not None).view(-1)[3] = (
                torch.nan
            )
        optimizer.step()


def fresh(method: Method, comm: Communicator, *, dense: bool = False) -> tuple[nn.Module, Any]:
    """A model and its optimizer, equal on all ranks."""
    model = net()
    make = method.dense if dense and method.dense else method.make
    return model, make(method.optimizer(model.parameters()), model, comm)


def shared(optimizer: Any, model: nn.Module) -> Tensor:
    """The model that all ranks train: their mean, where each has its own."""
    with optimizer.average_model() if hasattr(optimizer, "average_model") else nullcontext():
        return flat(model)
