"""A script for elastic Horovod; its ranks keep a ledger of what was computed, sent and kept.

Arguments: the way in (ours, ahead, stock or runner), a folder, and what happens in turn: ``add`` or ``remove`` a rank,
``kill`` it, ``end``.
The gradients do not depend on the parameters, so what every rank has sent can be told from what it has kept.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

WAY, FOLDER, EVENTS = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(",")
STEPS, LR = 4, 0.5
HOSTS = {"add": "localhost:2\n127.0.0.1:1\n", "remove": "localhost:2\n", "kill": ""}
SETTINGS: dict[str, Any] = {"ratio": 8.0, "warmup_steps": 0, "clip_norm": None}

hvd: Any = importlib.import_module("hvd_sketch" if WAY in ("ours", "ahead") else "horovod.torch")
wrapping: dict[str, Any] = {}
if WAY != "runner":
    from hvd_sketch import Compression, StepAhead

    wrapping["compression"] = Compression.topk(**SETTINGS) if WAY == "stock" else Compression.sharded(**SETTINGS)
if WAY == "ahead":
    wrapping["error_feedback"] = StepAhead(averaging_period=3)
UNIT = LR if WAY == "ahead" else 1.0
"""What is kept of a gradient of one."""

hvd.init()
torch.set_num_threads(1)
model = torch.nn.Linear(60, 40)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()
inner = torch.optim.SGD(model.parameters(), LR)
victim = os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1"
generator = torch.Generator().manual_seed(time.time_ns() % 2**31)


def wrap() -> Any:
    return hvd.DistributedOptimizer(inner, model.named_parameters(), **wrapping)


def exchange_of(optimizer: Any) -> Any:
    if WAY != "stock":
        return optimizer.exchange
    from hvd_sketch import exchange_of

    return exchange_of(wrapping["compression"])


def vector(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def unsent(optimizer: Any) -> torch.Tensor:
    exchange = exchange_of(optimizer)
    residual, slots = exchange.memory.residual, {slot.name: slot for slot in exchange.layout.slots}
    return vector(residual[slots[name].offset : slots[name].stop] for name, _ in model.named_parameters())


class Ledger:
    """What this process has had applied, by the step of every commit."""

    def __init__(self) -> None:
        self.applied = self.committed = torch.zeros(60 * 40 + 40, dtype=torch.float64)

    def commit(self) -> None:
        self.committed = self.applied.clone()
        torch.save(self.committed, FOLDER / f"{os.getpid()}.saving")
        os.replace(FOLDER / f"{os.getpid()}.saving", FOLDER / f"{os.getpid()}.applied")

    def restore(self) -> None:
        self.applied = self.committed.clone()


ledger, events = Ledger(), list(EVENTS)
since = [0, 2]
"""Steps done since the ranks changed, and how many there were."""


def next_event() -> str:
    """On rank 0: what happens now, if the last event has happened and some steps were done since."""
    size = hvd.size()
    if size != since[1]:
        since[:] = 0, size
        events.pop(0)
    since[0] += 1
    if since[0] != STEPS or events[0] == "end":
        return events[0] if since[0] > STEPS and events[0] == "end" else ""
    if HOSTS[events[0]]:
        (FOLDER / "hosts.new").write_text(HOSTS[events[0]])
        os.replace(FOLDER / "hosts.new", FOLDER / "hosts")
    return events[0]


def train(state: Any) -> None:
    while True:
        event = hvd.broadcast_object(next_event() if hvd.rank() == 0 else "", 0, name="event")
        if event == "end":
            return
        if event == "kill" and victim:
            os.kill(os.getpid(), signal.SIGKILL)
        state.optimizer.zero_grad()
        inputs, targets = torch.randn(8, 60, generator=generator), torch.randn(8, 40, generator=generator)
        (state.model(inputs) * targets).sum().backward()
        before = UNIT * vector(p.grad for p in model.parameters()) + (unsent(state.optimizer) if state.step else 0.0)
        state.optimizer.step()
        ledger.applied += (before - unsent(state.optimizer)) / hvd.size()
        state.step += 1
        ledger.commit()
        print(
            f"<step {state.step} of {exchange_of(state.optimizer).step} on {hvd.rank()} of {hvd.size()}>", flush=True
        )
        time.sleep(0.1)
        state.commit()


state = hvd.elastic.TorchState(model=model, optimizer=wrap(), step=0)


def changed() -> None:
    ledger.restore()
    if WAY == "runner":
        state.optimizer = wrap()


state.register_reset_callbacks([changed])
hvd.elastic.run(train)(state)
parts = sorted(FOLDER.glob("*.applied"))
expected = -LR / UNIT * sum(torch.load(part) for part in parts)
off = float((vector(model.parameters()) - expected).abs().max() / expected.abs().max())
same = torch.equal(*hvd.allgather(vector(model.parameters()).unsqueeze(0)))
departed = exchange_of(state.optimizer).stats.departed
print(f"<end: {len(parts)} processes, off by {off:.1e}, the same on all: {same}, departed: {departed}>", flush=True)
