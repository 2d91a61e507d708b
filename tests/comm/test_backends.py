"""Every backend gives the same collectives: sums of the same bits on all ranks, rows in their order, counted bytes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import hvd_sketch as hvd
from hvd_sketch.comm import Communicator, SingleProcess, as_communicator, chosen_backend, default_communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.comm.torch import TorchCommunicator
from hvd_sketch.errors import ConfigurationError, RankLostError
from tests.support.ranks import ranks, run

DTYPES = (torch.float32, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8)
LENGTH = 37


def contribution(rank: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, so that no sum is rounded."""
    return torch.arange(LENGTH).remainder(5).add(rank).to(dtype)


def check_collectives(comm: Communicator) -> None:
    """Each of them against its definition, for every dtype."""
    size, rank = comm.size, comm.rank
    for dtype in DTYPES:
        whole = [contribution(other, dtype) for other in range(size)]
        if dtype != torch.uint8:
            total = contribution(rank, dtype)
            comm.allreduce(total, f"sum.{dtype}")
            assert torch.equal(total, torch.stack(whole).sum(0).to(dtype))
        assert torch.equal(comm.allgather(whole[rank], f"gather.{dtype}"), torch.stack(whole))
        sent = torch.stack([whole[rank] + other for other in range(size)])
        assert torch.equal(comm.alltoall(sent, f"all.{dtype}"), torch.stack([row + rank for row in whole]))
        value = whole[rank].clone()
        comm.broadcast(value, size - 1, f"from.{dtype}")
        assert torch.equal(value, whole[-1])


def check_rounding(comm: Communicator) -> None:
    """Sums that are rounded have the same bits on all ranks."""
    values = torch.randn(1001, generator=torch.Generator(torch.get_default_device()).manual_seed(comm.rank))
    for dtype in (torch.float32, torch.float16):
        total = values.to(dtype)
        comm.allreduce(total, f"rounded.{dtype}")
        rows = comm.allgather(total.view(torch.uint8), f"compared.{dtype}")
        assert all(torch.equal(row, rows[0]) for row in rows)


def check_pending(comm: Communicator) -> None:
    """Several under way at once, waited for in another order, with what `poll` does in between."""
    tensors = [torch.full((LENGTH,), float(number)) for number in range(4)]
    pending = [comm.start_allreduce(tensor, f"pending.{number}") for number, tensor in enumerate(tensors)]
    for collective in pending:
        collective.poll()
    for number in reversed(range(4)):
        assert torch.equal(pending[number].wait(), torch.full((LENGTH,), float(number * comm.size)))


def check_bytes(comm: Communicator) -> None:
    """Those of the bandwidth-optimal ring."""
    size = comm.size
    tensor = torch.zeros(size, 30)
    expected: list[tuple[Callable[[], Any], int]] = [
        (lambda: comm.allreduce(tensor, "a"), 2 * (size - 1) * tensor.nbytes // size),
        (lambda: comm.allgather(tensor.view(-1), "b"), (size - 1) * tensor.nbytes),
        (lambda: comm.alltoall(tensor, "c"), (size - 1) * tensor.nbytes // size),
        (lambda: comm.broadcast(tensor, 0, "d"), tensor.nbytes if comm.rank == 0 and size > 1 else 0),
    ]
    for collective, nbytes in expected:
        before = comm.bytes_sent
        collective()
        assert comm.bytes_sent - before == nbytes


def check_objects(comm: Communicator) -> None:
    """Of different lengths."""
    told = comm.allgather_object({"rank": comm.rank, "text": "é" * 50 * comm.rank}, "objects")
    assert [(item["rank"], len(item["text"])) for item in told] == [(rank, 50 * rank) for rank in range(comm.size)]


def check(comm: Communicator) -> bool:
    for law in (check_collectives, check_rounding, check_pending, check_bytes, check_objects):
        law(comm)
    return True


def over_horovod() -> bool:
    hvd.init()
    return check(default_communicator())


def over_horovod_and_mpi4py() -> bool:
    from mpi4py import MPI

    return over_horovod() and check(as_communicator(MPI.COMM_WORLD))


def under_torchrun() -> str:
    """The default, a group, a dimension of a mesh; and what is said of a mesh of two dimensions."""
    hvd.init()
    assert chosen_backend() == "torch"
    assert (hvd.local_rank(), hvd.local_size()) == (hvd.rank(), hvd.size()) == (dist.get_rank(), 3)
    for comm in (default_communicator(), as_communicator(dist.group.WORLD)):
        assert isinstance(comm, TorchCommunicator)
        assert check(comm)
    pair = as_communicator(dist.new_group([0, 2]))
    assert pair.included == (hvd.rank() != 1)
    assert not pair.included or ((pair.rank, pair.size) == (hvd.rank() // 2, 2) and check(pair))
    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("replicate", "shard"))
    assert check(as_communicator(mesh["replicate"]))
    with pytest.raises(ConfigurationError) as refused:
        as_communicator(mesh)
    return str(refused.value)


def with_a_rank_that_ends() -> str:
    """The last rank leaves in the middle of training; what the others are told."""
    comm = default_communicator()
    comm.allreduce(torch.ones(1), "together")
    if comm.rank == comm.size - 1:
        return "left"
    with pytest.raises(RankLostError) as lost:
        comm.allreduce(torch.ones(100), "alone")
    return str(lost.value)


def on_a_rank_of_torchrun() -> tuple[str, str]:
    return under_torchrun(), with_a_rank_that_ends()


def test_torchrun_and_a_rank_that_ends_ends_the_others() -> None:
    told = ranks(3, on_a_rank_of_torchrun, launcher="torchrun")
    assert all('give the one whose ranks hold replicas, as in comm=mesh["replicate"]' in one for one, _ in told)
    assert [one.split(": ")[0] for _, one in told[:-1]] == [
        f"rank {rank} of 3 lost the others in allreduce alone" for rank in (0, 1)
    ]


ENDS = """
import atexit, os

threads = lambda: len(os.listdir("/proc/self/task"))
atexit.register(lambda: print("in the end", threads()))  # called last

import torch, hvd_sketch as hvd
from hvd_sketch.comm import default_communicator

before = threads()
hvd.init()
world = default_communicator()
dropped = world.subgroup([0])
for comm in (world, dropped):
    comm.allreduce(torch.ones(3), "ones")
del dropped
print("before", before, "more", threads() > before + 6)
"""


def test_no_thread_of_gloo_outlives_python() -> None:
    """One that lets go of a tensor when Python has ended would abort the process."""
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    ended = run((sys.executable, "-c", ENDS), env=one, timeout=60)
    before = re.search(r"before (\d+) more True", ended.output)
    assert before, ended
    assert f"in the end {before[1]}\n" in ended.output


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_in_one_process(size: int) -> None:
    assert all(run_in_process(size, check))


def test_a_single_process() -> None:
    assert check(SingleProcess())


def test_real_ranks_over_mpi() -> None:
    assert all(ranks(3, over_horovod_and_mpi4py))


def test_real_ranks_over_gloo() -> None:
    assert all(ranks(2, over_horovod, launcher="horovodrun-gloo"))


def test_anything_else_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="comm must be an mpi4py communicator"):
        as_communicator("world")
