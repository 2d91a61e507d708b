"""Elastic Horovod: ranks come and go, and ``hvd.elastic.TorchState`` handles our optimizers as well."""

from __future__ import annotations

import copy
import importlib
import logging
from typing import Any

import torch

from hvd_sketch import stock
from hvd_sketch.comm.states import broadcast_state
from hvd_sketch.compatibility import parameters_of
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.step_ahead import StepAheadOptimizer
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.methods.exchanging import ExchangingOptimizer
from hvd_sketch.methods.wrapper import WrappedOptimizer
from hvd_sketch.scope import begin_generation

_NAME = "hvd_sketch.elastic"
_logger = logging.getLogger("hvd_sketch")


class OptimizerHandler:
    """What a ``TorchState`` does with an optimizer that exchanges by a compressor; one of Horovod's ``StateHandler``.

    The optimizer's state is committed, restored and taken over from rank 0, as Horovod does. What is unsent is
    committed and restored with it, and stays each rank's own when ranks come or go. Whatever decides what is sent
    (step, schedule, scales) is taken over from rank 0, which Horovod sees to be one that has been there before.

    Args:
        optimizer: ours, or a stock one with a compressor of ours.

    Attributes:
        value: the optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.value = optimizer
        self.save()

    def save(self) -> None:
        """Commit."""
        self._optimizer = copy.deepcopy(self.value.state_dict())
        self._go_back = _exchange_of(self.value).snapshot()

    def restore(self) -> None:
        """Go back to what was committed."""
        self._load(self._optimizer)
        self._go_back()

    def sync(self) -> None:
        """Collective, when ranks have come or gone; begins the names of collectives anew."""
        exchange = _exchange_of(self.value)
        exchange.comm.occupation = "the synchronisation of elastic training"
        unsent, own = exchange.snapshot(), copy.deepcopy(self.value.state_dict())
        state = broadcast_state(exchange.comm, own, 0, f"{_NAME}.optimizer")
        keeps = isinstance(self.value, StepAheadOptimizer) and exchange.stats.steps > 0  # its state is its rank's own
        self._load(own if keeps else state)
        unsent()
        begin_generation()
        exchange.meet_others(_NAME)

    def set_value(self, value: Any) -> None:
        """Another optimizer takes the place, with what is unsent if that fits it.

        Raises:
            ConfigurationError: for one that cannot.
        """
        if value is not self.value:
            _check_new(self.value, value)
            _hand_over(_exchange_of(self.value), _exchange_of(value))
        self.value = value
        self.save()

    def _load(self, state: dict[str, Any]) -> None:
        """The optimizer's state, in place of a step that was broken off."""
        self.value.load_state_dict(copy.deepcopy(state))
        _exchange_of(self.value).reset()
        if not isinstance(self.value, _OURS):
            _client_of(self.value).begin_again()


_OURS = (ExchangingOptimizer, StepAheadOptimizer)
_NOT_ELASTIC = (
    "a TorchState handles what DistributedOptimizer gives; methods with a model of their own on every rank, such as "
    "LocalSGD or a swarm, are not made for ranks that come and go in Horovod"
)


def _client_of(optimizer: Any) -> stock.Client:
    return stock.client_of(optimizer._compression, optimizer)


def _exchange_of(optimizer: Any) -> Exchange:
    return optimizer.exchange if isinstance(optimizer, _OURS) else _client_of(optimizer).exchange


def _is_handled(optimizer: Any) -> bool:
    compresses = isinstance(vars(optimizer).get("_compression"), Compressor)
    return compresses or isinstance(optimizer, _OURS)


def _check_new(old: Any, new: Any) -> None:
    """Horovod's hooks of an optimizer stay with its parameters, and two of them would reduce under one name."""
    if not _is_handled(new):
        raise ConfigurationError(f"what takes the place of a compressing optimizer must compress, got {new!r}")
    if (
        not isinstance(old, _OURS)
        and not isinstance(new, _OURS)
        and not set(parameters_of(old)).isdisjoint(parameters_of(new))
    ):
        raise ConfigurationError(
            "stock Horovod's optimizer cannot be wrapped anew, because its hooks stay with the parameters; keep the "
            "old one, make the model anew as well, or use hvd_sketch.DistributedOptimizer"
        )


def _hand_over(old: Exchange, new: Exchange) -> None:
    try:
        new.succeed(old)
    except ConfigurationError as problem:
        new.reset()
        _logger.warning("hvd_sketch: what was unsent is lost, for it does not fit the new optimizer: %s", problem)


def _prepare() -> None:
    """Let Horovod's ``TorchState`` handle our optimizers; others stay Horovod's own."""
    state: Any = importlib.import_module("horovod.torch.elastic.state")
    registry = state.get_handler_registry()
    if any(getattr(make, "__module__", "") == __name__ for _, make in registry):
        return

    def handler(optimizer: torch.optim.Optimizer) -> Any:
        if isinstance(optimizer, WrappedOptimizer) and not isinstance(optimizer, _OURS):
            raise ConfigurationError(_NOT_ELASTIC)
        return OptimizerHandler(optimizer) if _is_handled(optimizer) else of_horovod(optimizer)

    of_horovod = next(make for kind, make in registry if kind is torch.optim.Optimizer)
    state.set_handler_registry([(torch.optim.Optimizer, handler), *registry])


stock.prepared_by(_prepare)
