"""Elastic training: ranks come and go, and nothing is lost, sent twice, or decided by one rank alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_sketch as hvd
from hvd_sketch import Compression
from hvd_sketch.comm import Communicator, Pending
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.comm.single import SingleProcess
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.frontends.elastic import OptimizerHandler
from tests.support.ranks import python, ranks, run

PLAIN: dict[str, Any] = {"ratio": 8.0, "clip_norm": None}
LR = 0.5
ALL_EVENTS = "add,remove,add,kill,end"
RUNNER = ("--compression", "sharded", "--ratio", "8", "--warmup-steps", "0", "--clip-norm", "0")
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
        self.unit = LR if isinstance(feedback.get("error_feedback"), hvd.StepAhead) else 1.0  # of what is kept
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
        gradient = self.vector(parameter.grad for parameter in self.model.parameters())
        before = self.unit * gradient + self.unsent()
        optimizer.step()
        self.applied += (before - self.unsent()) / self.comm.size / self.unit

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


FEEDBACKS = {"anticipate": {}, "plain": {"error_feedback": None}, "ahead": {"error_feedback": hvd.StepAhead(1.0, 4)}}


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_ranks_come_and_go_and_what_was_sent_and_what_is_kept_is_what_was_computed(
    compression: str, feedback: str
) -> None:
    workers = [Worker(number, compression, FEEDBACKS[feedback]) for number in range(4)]

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


def test_a_new_wrap_takes_over_what_is_unsent_and_how_many_have_gone() -> None:
    workers = [Worker(number, "sharded", {}) for number in range(3)]

    def body(comm: Communicator) -> None:
        worker = workers[comm.rank]
        if worker.handler is not None:
            kept, worker.comm.now = worker.unsent(), comm
            worker.handler.set_value(worker.wrap())
            assert torch.equal(worker.unsent(), kept)
        worker.begin(comm)
        for _ in range(5):
            worker.step()

    for size in (2, 3, 2, 2):
        run_in_process(size, body)
        check(workers, workers[:size])
    assert [worker.handler.value.exchange.stats.departed for worker in workers] == [1, 1, 0]  # type: ignore[union-attr]


def test_ranks_that_step_ahead_keep_their_own_optimizers_state() -> None:
    workers = [Worker(number, "topk, warm-up", {"error_feedback": hvd.StepAhead()}) for number in range(3)]
    for worker in workers:
        worker.plain = torch.optim.SGD(worker.model.parameters(), LR, momentum=0.9)

    def momentum(worker: Worker) -> Tensor:
        return worker.vector(state["momentum_buffer"] for state in worker.plain.state.values())

    def body(comm: Communicator) -> None:
        workers[comm.rank].begin(comm)
        if comm.size == 2:
            workers[comm.rank].step()

    run_in_process(2, body)
    before = [momentum(worker) for worker in workers[:2]]
    assert not torch.equal(*before)
    run_in_process(3, body)
    for worker, its in zip(workers, [*before, before[0]], strict=True):
        assert torch.equal(momentum(worker), its)


def test_what_cannot_come_and_go_is_refused() -> None:
    state = pytest.importorskip("horovod.torch.elastic.state")
    worker = Worker(0, "sharded", {})  # its compressor prepares Horovod
    worker.comm.now = SingleProcess()
    make = state.get_handler_registry()[0][1]
    with pytest.raises(ConfigurationError, match="LocalSGD .* come and go"):
        make(hvd.LocalSGD(worker.plain, worker.model, worker.comm))
    handler = make(worker.wrap())
    with pytest.raises(ConfigurationError, match="must compress"):
        handler.set_value(worker.plain)
    assert handler.value is not worker.plain


def wrapped_anew() -> str:
    import horovod.torch as horovod

    horovod.init()
    model, compression = torch.nn.Linear(60, 40), Compression.topk(ratio=8.0)

    def wrap(model: torch.nn.Module) -> Any:
        plain = torch.optim.SGD(model.parameters(), LR)
        return horovod.DistributedOptimizer(plain, model.named_parameters(), compression=compression)

    handler, new = OptimizerHandler(wrap(torch.nn.Linear(60, 40))), wrap(model)
    handler.set_value(new)
    assert handler.value is new
    try:
        handler.set_value(wrap(model))
    except ConfigurationError as error:
        return str(error)
    return ""


def test_stock_horovods_optimizer_is_wrapped_anew_with_its_model_alone() -> None:
    assert "its hooks stay with the parameters" in ranks(1, wrapped_anew)[0]


@pytest.mark.parametrize(
    ("way", "events"),
    [(way, ALL_EVENTS) for way in ("ours", "stock")] + [(way, "add,remove,end") for way in ("runner", "ahead")],
)
def test_ranks_come_go_and_die_in_elastic_horovod(way: str, events: str, tmp_path: Path) -> None:
    """From 2 to 3 processes, back, to 3, and, one killed, back to 2; survivors go back to the last commit."""
    (tmp_path / "hosts").write_text("localhost:2\n")
    discover = tmp_path / "discover"
    discover.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    discover.chmod(0o755)
    command = ("horovodrun", "--gloo", "--network-interface", "lo", "-np", "2", "--min-np", "2", "--max-np", "3")
    runner = ("-m", "hvd_sketch", *RUNNER) if way == "runner" else ()
    script = python(*runner, "tests/scripts/elastic_training.py", way, tmp_path, events)
    ended = run((*command, "--host-discovery-script", str(discover), *script), timeout=300)
    ends = re.findall(r"<end: (\d) processes, off by (\S+), the same on all: (\w+), departed: (\d)>", ended.output)
    assert len(ends) == 2, ended.output
    gone = events.count("add")
    for processes, off, same, departed in ends:
        assert (int(processes), same, int(departed)) == (2 + gone, "True", gone)
        assert float(off) < 1e-5
    numbers = re.findall(r"<step (\d+) of (\d+) on", ended.output)
    assert all(step == exchanged for step, exchanged in numbers), ended.output
