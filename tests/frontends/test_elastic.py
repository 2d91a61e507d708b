"""Elastic training: ranks come and go, and nothing is lost, sent twice, or decided by one rank alone."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_sketch as hvd
from hvd_sketch import Compression
from hvd_sketch.comm import Communicator, Pending
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.frontends.elastic import OptimizerHandler
from tests.support.ranks import run

PLAIN: dict[str, Any] = {"ratio": 8.0, "clip_norm": None}
LR = 0.5
COMPRESSIONS: dict[str, Any] = {
    "sharded": lambda: Compression.sharded(warmup_steps=0, **PLAIN),
    "sketch": lambda: Compression.sketch(warmup_steps=0, **PLAIN),
    "sketch, buckets": lambda: Compression.sketch(warmup_steps=0, buckets=2, **PLAIN),
    "topk, warm-up": lambda: Compression.topk(warmup_steps=12, **PLAIN),
    "powersgd": lambda: Compression.powersgd(rank=1, start_step=1, clip_norm=None),
    "guarded": lambda: Compression.sharded(schedule=hvd.Guard(8.0, every=2), clip_norm=None),
}


class Changing(Communicator):
    """The ranks that there are now."""

    def __init__(self) -> None:
        self.now: Any = None

    @property
    def rank(self) -> int:
        return int(self.now.rank)

    @property
    def size(self) -> int:
        return int(self.now.size)

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        result: Pending = self.now.post_allreduce(tensor, name)
        return result

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        result: Pending = self.now.post_allgather(tensor, name)
        return result

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        result: Pending = self.now.post_alltoall(tensor, name)
        return result

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        self.now.run_broadcast(tensor, root, name)


class Worker:
    """A process of elastic training, with a ledger of what it has had applied.

    Its gradients do not depend on the parameters, so what it has sent is what it has computed less what it keeps.
    """

    def __init__(self, number: int, compression: str, feedback: Any) -> None:
        self.comm, self.generator = Changing(), torch.Generator().manual_seed(number)
        self.model = torch.nn.Linear(60, 40)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        self.keywords: dict[str, Any] = {"compression": COMPRESSIONS[compression](), **feedback}
        self.plain = torch.optim.SGD(self.model.parameters(), LR)
        self.applied = torch.zeros(2440, dtype=torch.float64)
        self.handler: OptimizerHandler | None = None

    def wrap(self) -> Any:
        return hvd.DistributedOptimizer(self.plain, self.model.named_parameters(), comm=self.comm, **self.keywords)

    def vector(self, tensors: Any) -> Tensor:
        return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])

    def unsent(self) -> Tensor:
        assert self.handler is not None
        exchange = self.handler.value.exchange
        slots, residual = {slot.name: slot for slot in exchange.layout.slots}, exchange.memory.residual
        named = [slots[name] for name, _ in self.model.named_parameters()]
        return self.vector(residual[slot.offset : slot.stop] for slot in named)

    def begin(self, comm: Communicator) -> None:
        """Among other ranks than before: what ``TorchState.sync`` does."""
        self.comm.now = comm
        if self.handler is None:
            self.handler = OptimizerHandler(self.wrap())
        for parameter in self.model.parameters():
            comm.broadcast(parameter.detach(), 0, "parameters")
        self.handler.sync()

    def step(self) -> None:
        assert self.handler is not None
        optimizer = self.handler.value
        optimizer.zero_grad()
        inputs, targets = (torch.randn(8, size, generator=self.generator) for size in (60, 40))
        (self.model(inputs) * targets).sum().backward()
        before = self.vector(parameter.grad for parameter in self.model.parameters()) + self.unsent()
        optimizer.step()
        self.applied += (before - self.unsent()) / self.comm.size

    def commit(self) -> None:
        assert self.handler is not None
        self.handler.save()
        self.committed = self.applied.clone(), [parameter.detach().clone() for parameter in self.model.parameters()]

    def restore(self) -> None:
        assert self.handler is not None
        self.applied = self.committed[0].clone()
        torch._foreach_copy_([parameter.detach() for parameter in self.model.parameters()], self.committed[1])
        self.handler.restore()


def check(workers: list[Worker], present: list[Worker]) -> None:
    """The model is what all that were ever there have had applied; those that are there agree in all."""
    expected = -LR * torch.stack([worker.applied for worker in workers]).sum(0)
    for worker in present:
        torch.testing.assert_close(worker.vector(worker.model.parameters()), expected, rtol=0, atol=2e-4)
        assert worker.handler is not None
        assert worker.handler.value.exchange.step == present[0].handler.value.exchange.step  # type: ignore[union-attr]


@pytest.mark.parametrize("feedback", [{}, {"error_feedback": None}], ids=["anticipate", "plain"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_ranks_come_and_go_and_what_was_sent_and_what_is_kept_is_what_was_computed(
    compression: str, feedback: Any
) -> None:
    workers = [Worker(number, compression, feedback) for number in range(4)]

    def steps(present: list[Worker], count: int = 6) -> None:
        def body(comm: Communicator) -> None:
            worker = present[comm.rank]
            worker.begin(comm)
            for _ in range(count):
                worker.step()
            worker.commit()

        run_in_process(len(present), body)
        check(workers, present)

    first, second, third, fourth = workers
    steps([first, second])
    steps([first, second, third])
    keeps = [worker.unsent() for worker in (first, third)]

    def broken_off(comm: Communicator) -> None:
        worker = [first, second, third][comm.rank]
        worker.comm.now = comm
        for _ in range(2):
            worker.step()

    run_in_process(3, broken_off)
    for worker in (first, third):
        worker.restore()
    second.applied = second.committed[0]
    for worker, kept in zip((first, third), keeps, strict=True):
        assert torch.equal(worker.unsent(), kept)
    steps([first, third])
    steps([first, third, fourth])
    assert [worker.handler.value.exchange.stats.departed for worker in workers] == [1, 0, 1, 0]  # type: ignore[union-attr]


def test_a_new_wrap_takes_over_what_is_unsent() -> None:
    workers = [Worker(number, "sharded", {}) for number in range(3)]

    def body(comm: Communicator) -> None:
        worker = workers[comm.rank]
        if worker.handler is not None:
            worker.comm.now = comm
            worker.handler.set_value(worker.wrap())
        worker.begin(comm)
        for _ in range(5):
            worker.step()

    for size in (2, 3):
        run_in_process(size, body)
        check(workers, workers[:size])
    assert all(math.isfinite(float(worker.unsent().norm())) for worker in workers)


def test_a_rank_comes_and_dies_in_elastic_horovod(tmp_path: Path) -> None:
    """From 2 to 3 processes and back; survivors go back to the last commit."""
    (tmp_path / "hosts").write_text("localhost:2\n")
    discover = tmp_path / "discover"
    discover.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    discover.chmod(0o755)
    command = ("horovodrun", "--gloo", "--network-interface", "lo", "-np", "2", "--min-np", "2", "--max-np", "3")
    script = (sys.executable, "tests/scripts/elastic_training.py", "ours", str(tmp_path), "add,kill,end")
    ended = run((*command, "--host-discovery-script", str(discover), *script), timeout=300)
    ends = re.findall(r"<end: (\d) processes, off by (\S+), the same on all: (\w+), departed: (\d)>", ended.output)
    assert len(ends) == 2, ended.output
    for processes, off, same, departed in ends:
        assert (processes, same, departed) == ("3", "True", "1")
        assert float(off) < 1e-5
