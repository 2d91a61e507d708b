"""Horovod's ``…_async`` collectives, without Horovod: the same names, arguments in the same order, the same results.

Operations are matched by order, not by name: all ranks begin them in the same order. What begins is a handle for
`poll` and `synchronize`. The only process set is that of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.frontends.world import world

Average, Sum, Adasum, Min, Max, Product = range(6)  # Horovod's own numbers

_NAME = "hvd_sketch.collective"
_ADDED_AS = {torch.bfloat16: torch.float32, torch.bool: torch.int32}  # what a network cannot add up
_OF_ROWS: dict[int, Callable[[Tensor], Tensor]] = {
    Min: lambda rows: rows.amin(0),
    Max: lambda rows: rows.amax(0),
    Product: lambda rows: rows.prod(0, dtype=rows.dtype),
}


class Handle:
    """An operation that has begun, and what is to be done for its result."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish, self._result, self._done = finish, None, False

    def wait(self) -> Any:
        """The result."""
        if not self._done:
            self._result, self._done = self._finish(), True
        return self._result


def poll(handle: Handle) -> bool:
    """True, and `synchronize` will not wait; what has begun here comes to its end without the caller."""
    handle.wait()
    return True


def synchronize(handle: Handle) -> Any:
    """The result of an operation, when it is there."""
    return handle.wait()


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Handle:
    """Begin to reduce a tensor of the same shape and dtype on all ranks: to its mean, or what else ``op`` says.

    Raises:
        ConfigurationError: for ``op=Adasum``, for both ``op`` and ``average``, a process set, or a sparse tensor.
    """
    check_dense(tensor, name)
    comm, op = ranks_of(process_set), op_of(op, average)
    added_as = _ADDED_AS.get(tensor.dtype, tensor.dtype)
    values = torch.empty(tensor.shape, dtype=added_as, device=tensor.device).copy_(tensor.detach())
    if prescale_factor != 1.0:
        values.mul_(prescale_factor)
    if op in _OF_ROWS:
        rows = comm.start_allgather(values.view(-1), _NAME)
        return Handle(lambda: _scaled(_OF_ROWS[op](rows.wait()).view_as(tensor), postscale_factor).to(tensor.dtype))
    factor = postscale_factor / comm.size if op == Average else postscale_factor
    sums = comm.start_allreduce(values, _NAME, in_turn=False)
    return Handle(lambda: _scaled(sums.wait(), factor).to(tensor.dtype))


def allreduce_async_(tensor: Tensor, *arguments: Any, **keywords: Any) -> Handle:
    """Begin to reduce a tensor in place; see `allreduce_async`."""
    return _into(tensor, allreduce_async(tensor, *arguments, **keywords))


def grouped_allreduce_async(tensors: Sequence[Tensor], *arguments: Any, **keywords: Any) -> Handle:
    """Begin to reduce several tensors; see `allreduce_async`."""
    return _together([allreduce_async(tensor, *arguments, **keywords) for tensor in tensors])


def grouped_allreduce_async_(tensors: Sequence[Tensor], *arguments: Any, **keywords: Any) -> Handle:
    """Begin to reduce several tensors in place; see `allreduce_async`."""
    return _together([allreduce_async_(tensor, *arguments, **keywords) for tensor in tensors])


def sparse_allreduce_async(tensor: Tensor, name: str, op: int, process_set: Any = None) -> Callable[[], Tensor]:
    """Begin to sum or average a sparse tensor; what is returned is called for the result."""
    indices = allgather_async(tensor._indices().t(), process_set=process_set)
    values = allgather_async(tensor._values(), process_set=process_set)
    factor = 1.0 / world().size if op == Average else 1.0
    return lambda: torch.sparse_coo_tensor(indices.wait().t(), _scaled(values.wait(), factor), tensor.shape)


def allgather_async(tensor: Tensor, name: str | None = None, process_set: Any = None) -> Handle:
    """Begin to put all ranks' tensors behind each other; their first dimensions may differ."""
    comm = ranks_of(process_set)
    if tensor.dim() == 0:
        raise ConfigurationError("allgather puts tensors behind each other along a dimension, and this one has none")
    rest = tensor.shape[1:]
    counts = [
        int(count) for count in comm.allgather(torch.tensor([len(tensor)], dtype=torch.int64, device="cpu"), _NAME)
    ]
    padded = tensor.new_zeros(max(counts), *rest)
    padded[: len(tensor)] = tensor.detach()
    rows = comm.start_allgather(padded.view(-1), _NAME)
    return Handle(lambda: _first_of_each(rows.wait().view(comm.size, max(counts), *rest), counts))


def grouped_allgather_async(tensors: Sequence[Tensor], name: str | None = None, process_set: Any = None) -> Handle:
    """Begin to gather several tensors; see `allgather_async`."""
    return _together([allgather_async(tensor, name, process_set) for tensor in tensors])


def broadcast_async(tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> Handle:
    """Send the root's tensor to all; it is there at once."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())
    ranks_of(process_set).broadcast(whole, root_rank, _NAME)
    return Handle(lambda: whole)


def broadcast_async_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> Handle:
    """Overwrite a tensor by the root's; it is there at once."""
    return _into(tensor, broadcast_async(tensor, root_rank, name, process_set))


def alltoall_async(
    tensor: Tensor, splits: Tensor | None = None, name: str | None = None, process_set: Any = None
) -> Handle:
    """Begin to send ``splits[j]`` rows of a tensor to rank j, equally many to each without ``splits``.

    The result is what came, behind each other by rank, and with ``splits`` also how many rows came from each.

    Raises:
        ConfigurationError: when the splits are not as many as ranks, or do not add up to the rows.
    """
    comm = ranks_of(process_set)
    own = [len(tensor) // comm.size] * comm.size if splits is None else [int(count) for count in splits]
    if len(own) != comm.size or sum(own) != len(tensor):
        raise ConfigurationError(
            f"alltoall: {len(tensor)} rows cannot be sent to {comm.size} ranks in parts of {own}; give splits that "
            "add up to the rows, or a multiple of the ranks' number of rows"
        )
    table = comm.allgather(torch.tensor(own, dtype=torch.int64, device="cpu"), _NAME)
    most, counts = int(table.max()), table[:, comm.rank].tolist()
    padded = tensor.new_zeros(comm.size, most, *tensor.shape[1:])
    for row, part in zip(padded, tensor.detach().split(own), strict=True):
        row[: len(part)] = part
    arriving = comm.start_alltoall(padded.view(comm.size, -1), _NAME)

    def finish() -> Any:
        received = _first_of_each(arriving.wait().view(padded.shape), counts)
        return received if splits is None else (received, torch.tensor(counts, dtype=torch.int32, device="cpu"))

    return Handle(finish)


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Begin to reduce a tensor, of which each rank gets its part of the rows; costs as much as an allreduce here."""
    comm = ranks_of(process_set)
    reduced = allreduce_async(tensor, None, name, op, prescale_factor, postscale_factor, process_set)
    return Handle(lambda: torch.tensor_split(reduced.wait(), comm.size)[comm.rank].clone())


def grouped_reducescatter_async(tensors: Sequence[Tensor], *arguments: Any, **keywords: Any) -> Handle:
    """Begin to reduce and scatter several tensors; see `reducescatter_async`."""
    return _together([reducescatter_async(tensor, *arguments, **keywords) for tensor in tensors])


def ranks_of(process_set: Any) -> Communicator:
    """All ranks.

    Raises:
        ConfigurationError: for any other process set.
    """
    if process_set is not None and process_set is not global_process_set:
        raise ConfigurationError("process sets need Horovod; without it there is hvd.global_process_set alone")
    return world()


def op_of(op: int | None, average: bool | None) -> int:
    """The operation that is meant.

    Raises:
        ConfigurationError: for Adasum, or for both arguments.
    """
    if op is not None and average is not None:
        raise ConfigurationError("give op or average, which is its old form, not both")
    chosen = op if op is not None else Sum if average is False else Average
    if chosen not in (Average, Sum, *_OF_ROWS):
        raise ConfigurationError("op=Adasum needs Horovod; without it there are Average, Sum, Min, Max and Product")
    return chosen


def check_dense(tensor: Tensor, name: str | None) -> None:
    """Refuse to reduce a sparse tensor.

    Raises:
        ConfigurationError: naming the tensor, and what to call instead.
    """
    if tensor.layout != torch.strided:
        what = f"of shape {tuple(tensor.shape)}" if name is None else repr(name)
        raise ConfigurationError(
            f"allreduce adds up dense tensors, and the tensor {what} has the layout {tensor.layout}; give its "
            "to_dense(), or call hvd.sparse_allreduce_async(tensor, name, op)()"
        )


class _AllRanks:
    """The process set of all ranks."""

    process_set_id = 0

    def included(self) -> bool:
        """Always."""
        return True

    def rank(self) -> int:
        """This process's number."""
        return world().rank

    def size(self) -> int:
        """Number of processes."""
        return world().size


global_process_set = _AllRanks()


def _scaled(values: Tensor, factor: float) -> Tensor:
    """Of integers the whole part, as Horovod has it."""
    if factor == 1.0:
        return values
    return values.mul_(factor) if values.is_floating_point() else (values * factor).to(values.dtype)


def _first_of_each(rows: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])


def _into(tensor: Tensor, begun: Handle) -> Handle:
    def finish() -> Tensor:
        tensor.detach().copy_(begun.wait())
        return tensor

    return Handle(finish)


def _together(handles: Sequence[Handle]) -> Handle:
    return Handle(lambda: [handle.wait() for handle in handles])
