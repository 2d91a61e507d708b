"""The public `DistributedOptimizer`: checks its arguments and picks the road."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from hvd_sketch.comm import chosen_backend
from hvd_sketch.comm.hosts import Asked
from hvd_sketch.comm.launcher import check_not_alone
from hvd_sketch.compatibility import check_groups, correction_of
from hvd_sketch.compressors import Compression, Compressor, HalfPrecision, NoCompression
from hvd_sketch.error_feedback.ahead import AheadOptimizer
from hvd_sketch.error_feedback.anticipate import Anticipate
from hvd_sketch.error_feedback.base import ErrorFeedback, Wrapping, check_error_feedback
from hvd_sketch.error_feedback.default import Default, settle
from hvd_sketch.error_feedback.delayed import DelayedAnticipatingOptimizer, wrap_delayed
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import DenseExchange, Exchange
from hvd_sketch.frontends.arguments import (
    Average,
    check_arguments,
    check_compression,
    check_delayed,
    check_hierarchical,
    named_of,
    unfit_for_shards,
)
from hvd_sketch.frontends.beside import warn_of_what_is_beside
from hvd_sketch.frontends.grouped import grouped
from hvd_sketch.frontends.link import Link
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum
from hvd_sketch.methods.delayed import DelayedOptimizer
from hvd_sketch.methods.exchanging import ExchangingOptimizer
from hvd_sketch.methods.wiring import HorovodOptimizer, Wiring
from hvd_sketch.settings import check_given
from hvd_sketch.shards import Shards, check_shards, is_sharded, local_parts

Uncompressed = type[NoCompression] | type[HalfPrecision]


class Options(TypedDict, total=False):
    """The arguments of `DistributedOptimizer` that do not change what it returns."""

    gradient_predivide_factor: float
    num_groups: int
    groups: int | list[list[Tensor]] | None
    sparse_as_dense: bool
    process_set: Any
    comm: Any
    grad_scaler: torch.amp.GradScaler | None
    momentum_correction: bool
    momentum_masking: bool
    resync_every: int
    hierarchical: Asked


class OptionsAndDelay(Options, total=False):
    """With the one that is told by what it returns, where its value is known."""

    delayed: bool


@overload
def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Uncompressed | Compressor = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    *,
    delayed: Literal[True],
    error_feedback: Default | None = Default.OF_COMPRESSION,
    **options: Unpack[Options],
) -> DelayedOptimizer: ...


@overload
def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Compressor = ...,
    backward_passes_per_step: int = 1,
    op: int = Average,
    *,
    delayed: Literal[True],
    error_feedback: ErrorFeedback,
    **options: Unpack[Options],
) -> DelayedAnticipatingOptimizer: ...


@overload
def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Uncompressed = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    *,
    error_feedback: Default | None = Default.OF_COMPRESSION,
    **options: Unpack[OptionsAndDelay],
) -> HorovodOptimizer: ...


@overload
def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Compressor = ...,
    backward_passes_per_step: int = 1,
    op: int = Average,
    *,
    error_feedback: Default | None = Default.OF_COMPRESSION,
    **options: Unpack[OptionsAndDelay],
) -> ExchangingOptimizer: ...


@overload
def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Compressor = ...,
    backward_passes_per_step: int = 1,
    op: int = Average,
    *,
    error_feedback: ErrorFeedback,
    **options: Unpack[OptionsAndDelay],
) -> AheadOptimizer: ...


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = Average,  # what is no operation is told which there are
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
    resync_every: int = 0,
    error_feedback: ErrorFeedback | Default | None = Default.OF_COMPRESSION,
    hierarchical: Asked = None,
    delayed: bool = False,
) -> HorovodOptimizer | AheadOptimizer:
    """Wrap an optimizer so that its steps use the gradients of all ranks.

    Signature and behaviour are those of ``horovod.torch.DistributedOptimizer``; the result is
    an instance of a subclass of the optimizer's own class. With one process, and no ``comm``
    given, it trains as if it were not there.

    With ``Compression.none`` and ``fp16`` under Horovod this *is* Horovod's own optimizer. With
    a compressor of ours gradients are gathered while backward runs, and `synchronize` does the
    whole exchange in one fixed order, whatever the order of hooks.

    Parameters may be shards (DTensors of ``fully_shard``): then ``comm`` is the dimension of the mesh along which the
    same ones are held, and each rank exchanges its own, see `Shards`.

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
        comm: an mpi4py communicator, a process group of torch.distributed, a mesh of one dimension, or a
            `hvd_sketch.comm.Communicator`, to use in place of the one chosen by itself.
        grad_scaler: the scaler in use, so that the memory holds unscaled gradients; with
            ``error_feedback`` there is no need to tell.
        momentum_correction: accumulate the momentum of a wrapped SGD, with its weight decay, on
            each rank before the selection instead of after it (see `Momentum`); without a
            sparsifying compressor both are the same, and this changes nothing.
        momentum_masking: with the above, clear the momentum of what was sent.
        resync_every: in every so manieth step all ranks take over rank 0's parameters, which costs a broadcast of
            them: for processors of several kinds, whose PyTorch rounds the optimizer's steps differently.
            ``stats.drift`` tells how far apart they were. 0 for never.
        error_feedback: `StepAhead` or `Anticipate` takes gradients where what is unsent is already
            applied, in an unchanged training loop: see `AheadOptimizer`, which the result is then. None for
            none. The default is the compressor's own, see its ``anticipate``.
        hierarchical: whether the ranks of a host have one memory together and send one message, see
            `HierarchicalExchange`. None for yes where there are several hosts with equally many ranks, more than
            one, connected by mpi4py, torch.distributed, or Horovod with ``HOROVOD_DYNAMIC_PROCESS_SETS=1``; True to
            insist; a number for groups of so many ranks in a row; False for one memory a rank.
        delayed: exchange a step's gradients while the next one's are computed, and apply them one step late: see
            `DelayedOptimizer`, which the result is then. After the last step call its ``finish()`` on all ranks.

    Raises:
        ConfigurationError: when a setting cannot work, before any communication.
    """
    check_given(DistributedOptimizer, locals())
    check_arguments(optimizer, backward_passes_per_step, op, gradient_predivide_factor, process_set, comm)
    if resync_every < 0:
        raise ConfigurationError(f"resync_every must be at least 0, got {resync_every}")
    if num_groups != 0:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=2)
    compression, feedback = settle(
        compression, optimizer, error_feedback, averages=op == Average, corrects=momentum_correction
    )
    if delayed:
        check_delayed(optimizer, compression, feedback, resync_every)
    if feedback is not None:
        check_error_feedback(feedback, optimizer, compression, averages=op == Average, corrects=momentum_correction)
    asked = check_hierarchical(hierarchical, compression, feedback)
    if comm is None and chosen_backend() == "horovod" and not isinstance(compression, Compressor) and not delayed:
        return _stock_optimizer(
            optimizer,
            named_parameters=named_parameters,
            compression=compression,
            backward_passes_per_step=backward_passes_per_step,
            op=op,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=groups if groups is not None else num_groups or None,
            sparse_as_dense=sparse_as_dense,
            process_set=process_set,
            resync_every=resync_every,
        )
    check_compression(compression, op, optimizer)
    check_groups(groups)
    corrects = momentum_correction and isinstance(compression, Compressor)
    correction = correction_of(optimizer, masking=momentum_masking) if corrects else None
    named = named_of(optimizer, named_parameters)
    unfit = unfit_for_shards(
        compression, feedback, sparse_as_dense=sparse_as_dense, hierarchical=bool(asked), delayed=delayed
    )
    check_shards(named, comm, unfit)
    _layout(compression, [item for item in named if item[1].requires_grad])  # fails now, not in the first step
    sharded = any(is_sharded(parameter) for _, parameter in named)
    link = Link(comm, process_set, False if sharded else asked, apart=delayed)
    wiring = Wiring(
        make_exchange=partial(_exchange, compression, link, op == Average),
        is_active=link.is_active,
        backward_passes_per_step=backward_passes_per_step,
        sparse_as_dense=sparse_as_dense,
        grad_scaler=grad_scaler,
        correction=correction,
        resync_every=resync_every,
        attributes={"op": op, "process_set": process_set, "_groups": groups, "sparse_as_dense": sparse_as_dense},
    )
    if feedback is None:
        return DelayedOptimizer(optimizer, named, wiring) if delayed else ExchangingOptimizer(optimizer, named, wiring)
    wrapping = Wrapping(
        optimizer=optimizer, named=named, compression=compression, communicator=link.communicator, wiring=wiring
    )
    if delayed and isinstance(feedback, Anticipate):
        return wrap_delayed(feedback, wrapping)
    return feedback.wrap(wrapping)


def _exchange(
    compression: Any, link: Link, average: bool, parameters: dict[str, Tensor], momentum: Momentum | None
) -> Exchange:
    comm = link.communicator()
    warn_of_what_is_beside(parameters.values(), comm.size)
    device = next(iter(parameters.values())).device
    layout = _layout(compression, parameters.items())
    exchange: Exchange
    if isinstance(compression, Compressor):
        make = partial(compression.exchange, layout, comm, average=average, device=device, momentum=momentum)
        exchange = grouped(lambda hosts: make(hosts=hosts), link.hosts, link.note)
    else:
        dtype = torch.float16 if compression is HalfPrecision else torch.float32
        exchange = DenseExchange(layout, comm, average=average, device=device, dtype=dtype)
    shards = Shards.of(parameters.values())
    exchange.whole_norm = None if shards is None else shards.norm
    return exchange


def _layout(compression: Any, named_parameters: Iterable[tuple[str, Tensor]]) -> Layout:
    parts = local_parts(named_parameters)
    if isinstance(compression, Compressor):
        return compression.layout(parts)
    return Layout.of(parts, lambda name, parameter: False)


def _stock_optimizer(
    optimizer: torch.optim.Optimizer, *, process_set: Any, resync_every: int, **arguments: Any
) -> HorovodOptimizer:
    import horovod.torch as hvd

    if resync_every:
        raise ConfigurationError(
            "resync_every needs a compressor of ours: with Compression.none and fp16 this is Horovod's own optimizer"
        )
    check_not_alone(hvd.size())
    process_set = hvd.global_process_set if process_set is None else process_set
    # the runner of unmodified scripts may have put this function in place of Horovod's
    stock = getattr(hvd.DistributedOptimizer, "stock", hvd.DistributedOptimizer)
    distributed: HorovodOptimizer = stock(optimizer, process_set=process_set, **arguments)
    return distributed
