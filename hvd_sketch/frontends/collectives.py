"""Horovod's collectives that return a result, without Horovod; see `hvd_sketch.frontends.handles`.

`allreduce`, `allgather` and `broadcast` can be differentiated, with Horovod's own derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.compressors import Compression
from hvd_sketch.frontends import handles
from hvd_sketch.frontends.handles import Average, Sum, check_dense, op_of, ranks_of
from hvd_sketch.frontends.world import world


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Tensor:
    """The mean of a tensor over the ranks, or what else ``op`` says; the input stays.

    Args:
        tensor: of the same shape and dtype on all ranks.
        average: the old form of ``op``: False for Sum.
        name: without effect.
        compression: ``Compression.none`` or ``fp16``.
        op: Average, Sum, Min, Max or Product.
        prescale_factor: of every rank's tensor.
        postscale_factor: of the result.
        process_set: all ranks.

    Raises:
        ConfigurationError: see `handles.allreduce_async`.
    """
    check_dense(tensor, name)
    packed, context = compression.compress(tensor)
    factors = prescale_factor, postscale_factor
    reduced = _Allreduce.apply(packed, op_of(op, average), *factors, process_set)  # type: ignore[no-untyped-call]
    unpacked: Tensor = compression.decompress(reduced, context)
    return unpacked


def allreduce_(tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """Reduce a tensor in place; see `handles.allreduce_async`."""
    reduced: Tensor = handles.allreduce_async_(tensor, *arguments, **keywords).wait()
    return reduced


def grouped_allreduce(tensors: Sequence[Tensor], *arguments: Any, **keywords: Any) -> list[Tensor]:
    """Reduce several tensors; see `allreduce`."""
    return [allreduce(tensor, *arguments, **keywords) for tensor in tensors]


def grouped_allreduce_(tensors: Sequence[Tensor], *arguments: Any, **keywords: Any) -> list[Tensor]:
    """Reduce several tensors in place; see `handles.allreduce_async`."""
    return [allreduce_(tensor, *arguments, **keywords) for tensor in tensors]


def allgather(tensor: Tensor, name: str | None = None, process_set: Any = None) -> Tensor:
    """All ranks' tensors, behind each other along the first dimension, in which they may differ."""
    gathered: Tensor = _Allgather.apply(tensor, process_set)  # type: ignore[no-untyped-call]
    return gathered


def grouped_allgather(tensors: Sequence[Tensor], name: str | None = None, process_set: Any = None) -> list[Tensor]:
    """Gather several tensors."""
    return [allgather(tensor, name, process_set) for tensor in tensors]


def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> Tensor:
    """The root's tensor; the input stays."""
    received: Tensor = _Broadcast.apply(tensor, root_rank, process_set)  # type: ignore[no-untyped-call]
    return received


def broadcast_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> Tensor:
    """Overwrite a tensor by the root's."""
    received: Tensor = handles.broadcast_async_(tensor, root_rank, name, process_set).wait()
    return received


def alltoall(
    tensor: Tensor, splits: Tensor | None = None, name: str | None = None, process_set: Any = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Send rows of a tensor to each rank; see `handles.alltoall_async`."""
    received: Tensor | tuple[Tensor, Tensor] = handles.alltoall_async(tensor, splits, name, process_set).wait()
    return received


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """This rank's part of a reduced tensor's rows; see `handles.reducescatter_async`."""
    packed, context = compression.compress(tensor)
    reduced = handles.reducescatter_async(packed, name, op, process_set, prescale_factor, postscale_factor).wait()
    unpacked: Tensor = compression.decompress(reduced, context)
    return unpacked


def grouped_reducescatter(tensors: Sequence[Tensor], *arguments: Any, **keywords: Any) -> list[Tensor]:
    """Reduce and scatter several tensors; see `reducescatter`."""
    return [reducescatter(tensor, *arguments, **keywords) for tensor in tensors]


def barrier(process_set: Any = None) -> None:
    """Wait until all ranks are here."""
    handles.allreduce_async(torch.zeros(1, dtype=torch.float32, device="cpu"), op=Sum, process_set=process_set).wait()


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, op: int, before: float, after: float, process_set: Any) -> Any:
        ctx.settings = op, before, after, process_set
        return handles.allreduce_async(tensor, None, None, op, before, after, process_set).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        reduced = handles.allreduce_async(gradients[0], None, None, *ctx.settings).wait()
        return reduced, None, None, None, None


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_set: Any) -> Any:
        ctx.count, ctx.process_set = len(tensor) if tensor.dim() else 0, process_set
        return handles.allgather_async(tensor, process_set=process_set).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        mean = handles.allreduce_async(gradients[0], process_set=ctx.process_set).wait()
        counts = handles.allgather_async(torch.tensor([ctx.count], dtype=torch.int64, device="cpu")).wait().tolist()
        return mean.split(counts)[world().rank], None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root_rank: int, process_set: Any) -> Any:
        ctx.is_root, ctx.process_set = ranks_of(process_set).rank == root_rank, process_set
        return handles.broadcast_async(tensor, root_rank, process_set=process_set).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        mean = handles.allreduce_async(gradients[0], process_set=ctx.process_set).wait()
        return mean if ctx.is_root else torch.zeros_like(mean), None, None
