"""Tensors of a device travel through host memory: in order, and no earlier than they are there.

The device is played by copies that arrive late; the ranks are real.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import Communicator, staged
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.comm.mpi import MpiCommunicator
from tests.support.ranks import in_turn, ranks, several
from tests.support.simulation import Run, drive, heavy_tailed


@dataclass
class Late:
    """An event that is over after some questions, or when somebody waits for it; until then the copy is not there."""

    host: Tensor
    content: Tensor
    questions: int = field(default_factory=lambda: random.randrange(4))

    def query(self) -> bool:
        self.questions -= 1
        if self.questions < 0:
            self.synchronize()
        return self.questions < 0

    def synchronize(self) -> None:
        self.host.copy_(self.content)


def copy_late(tensor: Tensor) -> Any:
    host = torch.full_like(tensor, 77)
    return staged._Outgoing(host, Late(host, tensor.clone()))  # type: ignore[arg-type]


class OfADevice(MpiCommunicator):
    """Takes every tensor for one of a device."""

    def reaches(self, device: torch.device) -> bool:
        return False


def patched(body: Callable[[Communicator], Any]) -> Any:
    comm = OfADevice()
    random.seed(comm.rank)  # copies arrive at other times on other ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "_copy_out", copy_late)
        return body(comm)


def collectives(comm: Communicator) -> list[Tensor]:
    """Several under way at a time, polled and awaited in no order."""
    mine, rank = torch.arange(6.0), comm.rank
    summed = [mine + 10 * number + rank for number in range(5)]
    pending = [comm.start_allreduce(tensor, f"sum{number}") for number, tensor in enumerate(summed)]
    gathered = comm.start_allgather(mine.to(torch.int64) + rank, "gather")
    turned = comm.start_alltoall(torch.tensor([[rank, 0], [rank, 1]]), "turn")
    for each in random.sample(pending, 3):
        each.poll()
    results = [gathered.wait(), *(each.wait() for each in pending), turned.wait()]
    told = torch.full((3,), float(rank))
    comm.broadcast(told, 1, "tell")
    half = torch.ones(5, dtype=torch.float16) * (rank + 1)
    comm.allreduce(half, "half")
    return [*results, *summed, told, half]


def test_collectives_give_what_they_give_on_the_host() -> None:
    for ours, expected in ranks(2, in_turn, [staged_body, plain_body]):
        assert all(map(torch.equal, ours, expected))


def staged_body() -> list[Tensor]:
    results: list[Tensor] = patched(collectives)
    return results


def plain_body() -> list[Tensor]:
    return collectives(MpiCommunicator())


def exchanges(comm: Communicator) -> list[Run]:
    plain: dict[str, Any] = {"ratio": 10.0, "warmup_steps": 1, "clip_norm": None}
    compressors = (Compression.sketch(**plain, buckets=3), Compression.sharded(**plain, buckets=2))
    return [drive(comm, each, heavy_tailed(5, 5470, seed=comm.rank)) for each in compressors]


def exchanged_body(late: bool) -> list[list[Tensor]]:
    runs = patched(exchanges) if late else exchanges(MpiCommunicator())
    return [[run.updates, run.residual] for run in runs]


def test_exchanges_give_what_they_give_on_the_host() -> None:
    for ours, expected in ranks(2, several, exchanged_body, [(True,), (False,)]):
        for run, reference in zip(ours, expected, strict=True):
            assert all(map(torch.equal, run, reference))


def test_horovod_without_support_for_gpus_gets_none_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    horovod = pytest.importorskip("horovod.torch")
    from hvd_sketch.comm.horovod import HorovodCommunicator

    monkeypatch.setattr(HorovodCommunicator, "__init__", lambda self: None)
    host, device = torch.device("cpu"), torch.device("cuda")
    for nccl, cuda in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(horovod, "nccl_built", lambda built=nccl: built)
        monkeypatch.setattr(horovod, "cuda_built", lambda built=cuda: built)
        assert HorovodCommunicator().reaches(host)
        assert HorovodCommunicator().reaches(device) == (nccl or cuda)


def test_simulated_ranks_start_nothing_while_backward_runs_on_a_gpu() -> None:
    (comm,) = InProcessGroup(1).communicators
    assert comm.starts_in_backward(torch.device("cpu"))
    assert not comm.starts_in_backward(torch.device("cuda"))
