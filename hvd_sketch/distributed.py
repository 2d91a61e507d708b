"""The public `DistributedOptimizer`: checks its arguments and picks the road."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator, as_communicator, default_communicator, has_horovod
from hvd_sketch.compatibility import check_groups, check_momentum, correction_of
from hvd_sketch.compression import Compression
from hvd_sketch.compressors import Compressor
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import DenseExchange, Exchange
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum
from hvd_sketch.methods.anticipate import Anticipate, AnticipatingOptimizer, check_anticipate
from hvd_sketch.methods.common_share import CommonShare
from hvd_sketch.methods.factored_moments import MomentsObserver
from hvd_sketch.methods.step_ahead import StepAhead, StepAheadOptimizer, check_step_ahead
from hvd_sketch.optimizer import distribute
from hvd_sketch.uncompressed import HalfPrecision, NoCompression

Average, Sum = 0, 1  # Horovod's own numbers


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    comm: Any = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    momentum_correction: bool = False,
    momentum_masking: bool = True,
    error_feedback: StepAhead | Anticipate | None = None,
) -> torch.optim.Optimizer:
    """Wrap an optimizer so that its steps use the gradients of all ranks.

    Signature and behaviour are those of ``horovod.torch.DistributedOptimizer``; the result is
    an instance of a subclass of the optimizer's own class. With one process, and no ``comm``
    given, it trains as if it were not there.

    With ``Compression.none`` and ``fp16`` under Horovod this *is* Horovod's own optimizer. With
    a compressor of ours gradients are gathered while backward runs, and `synchronize` does the
    whole exchange in one fixed order, whatever the order of hooks.

    Args:
        optimizer: the optimizer to wrap, before or after loading its state.
        named_parameters: ``model.named_parameters()``; names fix the order and must be unique.
        compression: a member of `Compression`.
        backward_passes_per_step: local passes whose gradients are added up before an exchange.
        op: ``Average`` or ``Sum``.
        gradient_predivide_factor: accepted for ``Average``; it has no effect on a sparse exchange.
        num_groups: deprecated name of ``groups``.
        groups: Horovod's fusion groups; a sparse exchange is one fused message anyway.
        sparse_as_dense: turn sparse gradients into dense ones instead of refusing them.
        process_set: a Horovod process set; ranks outside it take local steps.
        comm: an mpi4py communicator or a `hvd_sketch.comm.Communicator` to use in place of Horovod.
        grad_scaler: the scaler in use, so that the memory holds unscaled gradients; with
            ``error_feedback`` there is no need to tell.
        momentum_correction: accumulate the momentum of a wrapped SGD, with its weight decay, on
            each rank before the selection instead of after it (see `Momentum`); without a
            sparsifying compressor both are the same, and this changes nothing.
        momentum_masking: with the above, clear the momentum of what was sent.
        error_feedback: `StepAhead` or `Anticipate` takes gradients where what is unsent is already
            applied; the result is then an `AheadOptimizer`, to be used as it says.

    Raises:
        ConfigurationError: when a setting cannot work, before any communication.
    """
    _check_arguments(optimizer, backward_passes_per_step, op, gradient_predivide_factor, process_set, comm)
    if num_groups != 0:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=2)
    if error_feedback is not None:
        check_step_ahead(compression, momentum_correction, averages=op == Average)
    if isinstance(error_feedback, Anticipate):
        check_anticipate(optimizer, error_feedback)
    if comm is None and has_horovod() and not isinstance(compression, Compressor):
        return _stock_optimizer(
            optimizer,
            named_parameters,
            compression,
            backward_passes_per_step,
            op,
            gradient_predivide_factor,
            groups=groups if groups is not None else num_groups or None,
            sparse_as_dense=sparse_as_dense,
            process_set=process_set,
        )
    _check_compression(compression, op, optimizer)
    check_groups(groups)
    corrects = momentum_correction and isinstance(compression, Compressor)
    correction = correction_of(optimizer, masking=momentum_masking) if corrects else None
    named = _named(optimizer, named_parameters)
    lazy = _Lazy(comm, process_set)
    if isinstance(error_feedback, StepAhead):
        return StepAheadOptimizer(optimizer, named, compression, lazy.get, lazy.is_active, error_feedback)
    layout = _layout(compression, [item for item in named if item[1].requires_grad])
    shares = None if error_feedback is None else CommonShare()
    moments = None
    if error_feedback is not None and error_feedback.second_moments is not None:
        moments = MomentsObserver(error_feedback.second_moments, named)
    distributed = distribute(
        optimizer,
        named,
        partial(_exchange, compression, lazy, op == Average, [item for item in (shares, moments) if item is not None]),
        lazy.is_active,
        backward_passes_per_step=backward_passes_per_step,
        sparse_as_dense=sparse_as_dense,
        grad_scaler=grad_scaler,
        correction=correction,
        before_step=None if moments is None else moments.lend,
        attributes={"op": op, "process_set": process_set, "_groups": groups},
    )
    if error_feedback is None or shares is None:
        return distributed
    return AnticipatingOptimizer(distributed, named, layout, lazy.is_active, shares, error_feedback)


def _check_arguments(
    optimizer: torch.optim.Optimizer, passes: int, op: int, predivide_factor: float, process_set: Any, comm: Any
) -> None:
    """What is wrong with any compression."""
    if type(optimizer).__module__ == "horovod.torch.optimizer":
        raise ConfigurationError("the optimizer is already a DistributedOptimizer; wrap the plain one")
    if process_set is not None and comm is not None:
        raise ConfigurationError("give process_set (of Horovod) or comm (in place of Horovod), not both")
    if passes <= 0:
        raise ConfigurationError(f"backward_passes_per_step must be at least 1, got {passes}")
    if predivide_factor != 1.0 and op != Average:
        raise ConfigurationError("gradient_predivide_factor is supported with op=Average only")


def _check_compression(compression: Any, op: int, optimizer: torch.optim.Optimizer) -> None:
    """What is wrong with an exchange of ours."""
    if compression not in (NoCompression, HalfPrecision) and not isinstance(compression, Compressor):
        raise ConfigurationError(
            f"compression={compression!r} is no member of hvd_sketch.Compression: use none, fp16, auto() or another"
        )
    if op not in (Average, Sum):
        raise ConfigurationError(f"op={op} cannot be combined with compression: only Average and Sum are linear")
    if isinstance(compression, Compressor):
        check_momentum(compression.momentum, optimizer)


class _Lazy:
    """The communicator. Horovod's is made on first use: it may be initialised after the optimizer is wrapped.

    Any other is made now, because to make one is a collective call, and hooks fire in any order.
    """

    def __init__(self, comm: Any, process_set: Any) -> None:
        self._explicit = comm is not None
        self._process_set = process_set
        self._comm: Communicator | None = as_communicator(comm) if comm is not None else None
        if not has_horovod():
            self.get()

    def get(self) -> Communicator:
        if self._comm is None:
            self._comm = default_communicator(self._process_set)
        return self._comm

    def is_active(self) -> bool:
        """Whether there is anybody to exchange with, or the caller insists."""
        comm = self.get()
        return comm.included and (self._explicit or comm.size > 1 or os.environ.get("HOROVOD_ELASTIC") == "1")


def _exchange(
    compression: Any,
    lazy: _Lazy,
    average: bool,
    followers: Sequence[CommonShare | MomentsObserver],
    parameters: dict[str, Tensor],
    momentum: Momentum | None,
) -> Exchange:
    comm = lazy.get()
    device = next(iter(parameters.values())).device
    layout = _layout(compression, parameters.items())
    if isinstance(compression, Compressor):
        exchange = compression.exchange(layout, comm, average=average, device=device, momentum=momentum)
    else:
        dtype = torch.float16 if compression is HalfPrecision else torch.float32
        exchange = DenseExchange(layout, comm, average=average, device=device, dtype=dtype)
    for follower in followers:
        follower.attach(exchange)
    return exchange


def _layout(compression: Any, named_parameters: Iterable[tuple[str, Tensor]]) -> Layout:
    if isinstance(compression, Compressor):
        return compression.layout(named_parameters)
    return Layout.of(named_parameters, lambda name, parameter: False)


def _named(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> list[tuple[str, Tensor]]:
    groups = optimizer.param_groups
    if named_parameters is None:
        return [
            (f"allreduce.noname.{i}.{j}", p) for i, group in enumerate(groups) for j, p in enumerate(group["params"])
        ]
    named = list(named_parameters)
    if any(not isinstance(item, tuple) for item in named):
        raise ConfigurationError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()"
        )
    held = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
    known = {id(parameter) for _, parameter in named}
    unnamed = [place for identity, place in held.items() if identity not in known]
    if unnamed:
        raise ConfigurationError(
            f"named_parameters lacks {len(unnamed)} parameters of the optimizer, the first one at (group, index) "
            f"{unnamed[0]}; pass the named_parameters() of every model whose parameters it holds"
        )
    return [(name, parameter) for name, parameter in named if id(parameter) in held]


def _stock_optimizer(
    optimizer: torch.optim.Optimizer, *args: Any, process_set: Any, **kwargs: Any
) -> torch.optim.Optimizer:
    import horovod.torch as hvd

    process_set = hvd.global_process_set if process_set is None else process_set
    # the launcher of unmodified scripts may have put this function in place of Horovod's
    stock = getattr(hvd.DistributedOptimizer, "stock", hvd.DistributedOptimizer)
    distributed: torch.optim.Optimizer = stock(optimizer, *args, process_set=process_set, **kwargs)
    return distributed
