"""Collectives without Horovod give what Horovod's give: the same calls on real ranks, with one and with the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import ranks

Call = Callable[[Any, int], Any]


def tensor(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(6).view(2, 3) * 3 + rank).to(dtype)


def ragged(rank: int) -> Tensor:
    return torch.arange(2.0 * (rank + 1)).view(rank + 1, 2)


def gradient(collective: Callable[[Tensor], Tensor], rank: int) -> Tensor:
    leaf = ragged(rank)[:1].clone().requires_grad_()
    derivative: Tensor
    (derivative,) = torch.autograd.grad((collective(leaf) * torch.arange(2.0)).sum(), leaf)
    return derivative


def sparse(rank: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[rank, 2]]), torch.tensor([[1.0], [2.0]]), (4, 1))


def in_place(collective: Callable[[Tensor], Any], rank: int) -> Tensor:
    target = tensor(rank)
    assert id(collective(target)) == id(target)
    return target


CALLS: dict[str, Call] = {
    "mean": lambda hvd, rank: hvd.allreduce(tensor(rank)),
    "sum by position": lambda hvd, rank: hvd.allreduce(tensor(rank), False),
    "mean by position": lambda hvd, rank: hvd.allreduce(tensor(rank), True, "named"),
    "sum of integers": lambda hvd, rank: hvd.allreduce(tensor(rank, torch.int64), op=hvd.Sum),
    "mean of integers": lambda hvd, rank: hvd.allreduce(tensor(rank, torch.int64), op=hvd.Average),
    "half": lambda hvd, rank: hvd.allreduce(tensor(rank), compression=hvd.Compression.fp16),
    "no dimension": lambda hvd, rank: hvd.allreduce(torch.tensor(1.0 + rank)),
    "least": lambda hvd, rank: hvd.allreduce(tensor(rank), op=hvd.Min),
    "largest": lambda hvd, rank: hvd.allreduce(tensor(rank), op=hvd.Max),
    "product": lambda hvd, rank: hvd.allreduce(tensor(rank), op=hvd.Product),
    "scaled": lambda hvd, rank: hvd.allreduce(tensor(rank), op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.25),
    "in place": lambda hvd, rank: in_place(lambda t: hvd.allreduce_(t, op=hvd.Sum), rank),
    "begun": lambda hvd, rank: hvd.synchronize(hvd.allreduce_async(tensor(rank), name="begun")),
    "begun in place": lambda hvd, rank: in_place(lambda t: hvd.synchronize(hvd.allreduce_async_(t)), rank),
    "several": lambda hvd, rank: hvd.grouped_allreduce([tensor(rank), ragged(0) + rank], op=hvd.Sum),
    "sparse": lambda hvd, rank: hvd.sparse_allreduce_async(sparse(rank), "sparse", hvd.Average)().to_dense(),
    "gathered": lambda hvd, rank: hvd.allgather(ragged(rank), "gathered"),
    "gathered bytes": lambda hvd, rank: hvd.allgather(ragged(rank).byte()),
    "gathering begun": lambda hvd, rank: hvd.synchronize(hvd.allgather_async(ragged(rank))),
    "broadcast": lambda hvd, rank: hvd.broadcast(tensor(rank), 1),
    "broadcast in place": lambda hvd, rank: in_place(lambda t: hvd.broadcast_(t, 1, name="b"), rank),
    "broadcast begun": lambda hvd, rank: hvd.synchronize(hvd.broadcast_async(tensor(rank), root_rank=1)),
    "all to all": lambda hvd, rank: hvd.alltoall(tensor(rank)),
    "all to all, split": lambda hvd, rank: hvd.alltoall(ragged(2), splits=torch.tensor([1 + rank, 2 - rank]).int()),
    "scattered": lambda hvd, rank: hvd.reducescatter(ragged(2) + rank, op=hvd.Sum),
    "objects": lambda hvd, rank: hvd.allgather_object({"rank": (rank, torch.tensor([float(rank)]))}),
    "object": lambda hvd, rank: hvd.broadcast_object([rank, {"of": torch.ones(3) * rank}], 1),
    "nothing comes of a barrier": lambda hvd, rank: hvd.barrier(),
    "derivative of the mean": lambda hvd, rank: gradient(hvd.allreduce, rank),
    "derivative of gathering": lambda hvd, rank: gradient(hvd.allgather, rank),
    "derivative of a broadcast": lambda hvd, rank: gradient(lambda t: hvd.broadcast(t, 0), rank),
    "polled": lambda hvd, rank: polled(hvd, hvd.allreduce_async(tensor(rank))),
    "joined": lambda hvd, rank: isinstance(hvd.join(), int),
    "places": lambda hvd, rank: (
        *(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()),
        *(hvd.is_initialized(), hvd.mpi_built(), hvd.mpi_enabled(), bool(hvd.nccl_built()), hvd.cuda_built()),
        *(hvd.mpi_threads_supported(), hvd.rocm_built(), hvd.ccl_built(), hvd.ddl_built()),
        *(hvd.global_process_set.rank(), hvd.global_process_set.size(), hvd.global_process_set.included()),
    ),
}


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as told:  # noqa: PT011 - its text is looked at
        call()
    return f"{type(told.value).__name__}: {told.value}"


REFUSED: dict[str, Call] = {
    "words": lambda hvd, rank: hvd.allreduce(sparse(rank), name="words"),
    "words, in place": lambda hvd, rank: hvd.allreduce_(sparse(rank), name="words, in place"),
    "words, in half": lambda hvd, rank: hvd.allreduce(
        sparse(rank), name="words, in half", compression=hvd.Compression.fp16
    ),
}


def polled(hvd: Any, handle: Any) -> Tensor:
    while not hvd.poll(handle):
        pass
    result: Tensor = hvd.synchronize(handle)
    return result


def results(forbid: bool) -> dict[str, Any]:
    if forbid:
        sys.modules["horovod"] = None  # type: ignore[assignment]
    import hvd_sketch as hvd

    untyped: Any = hvd
    untyped.init()
    told = {name: call(untyped, untyped.rank()) for name, call in CALLS.items()}
    if forbid:
        told |= {name: refused(partial(call, untyped, untyped.rank())) for name, call in REFUSED.items()}
        told["no name"] = refused(partial(untyped.allreduce, sparse(untyped.rank())))
    untyped.shutdown()
    return told


@pytest.fixture(scope="module")
def both() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return ranks(2, results, False), ranks(2, results, True)


@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_horovods(both: tuple[list[dict[str, Any]], list[dict[str, Any]]], name: str) -> None:
    for theirs, ours in zip(*both, strict=True):
        assert type(theirs[name]) is type(ours[name])
        assert_same(theirs[name], ours[name])


@pytest.mark.parametrize("name", REFUSED)
def test_a_sparse_tensor_is_refused_by_name(
    both: tuple[list[dict[str, Any]], list[dict[str, Any]]], name: str
) -> None:
    for told in both[1]:
        assert told[name].startswith("ConfigurationError")
        assert f"the tensor {name!r} has the layout torch.sparse_coo; give its to_dense(), or call" in told[name]
        assert "the tensor of shape (4, 1) has the layout torch.sparse_coo" in told["no name"]


def assert_same(theirs: Any, ours: Any) -> None:
    if isinstance(theirs, Tensor):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours), (theirs, ours)
    elif isinstance(theirs, list | tuple):
        for one, other in zip(theirs, ours, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, dict):
        assert_same(list(theirs.items()), list(ours.items()))
    else:
        assert theirs == ours
