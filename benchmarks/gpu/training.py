"""``mpirun -np 2 python -m benchmarks.gpu.training``: a real training on ranks that share a GPU.

A transformer of 100 million parameters, each rank with its batches, through MPI and host memory. For each method a row
with the median ``seconds`` of a step, of them ``compute_seconds`` until the gradients are there, the bytes that a rank
sends in a step, and the ``phases`` of the exchange as `hvd_sketch.Stats` has them, which are those of the host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from benchmarks.accuracy.large.model import SMALL, Language, Size, loss_of
from benchmarks.accuracy.large.text import Text
from benchmarks.gpu.record import Record, Row
from hvd_sketch import Anticipate, Compression, DistributedOptimizer
from hvd_sketch.comm import Communicator, as_communicator
from hvd_sketch.exchange import DenseExchange
from hvd_sketch.layout import Layout

HUNDRED_MILLION = Size(width=1024, layers=8, context=512, batch=8, rate=3e-4, text_bytes=16 << 20, held_out=8)
_PLAIN: dict[str, Any] = {"ratio": 40.0, "warmup_steps": 0}
METHODS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "dense": {},
    "sharded": {"compression": Compression.sharded(**_PLAIN)},
    "sharded, anticipate": {"compression": Compression.sharded(**_PLAIN), "error_feedback": Anticipate()},
    "sketch": {"compression": Compression.sketch(**_PLAIN)},
    "powersgd": {"compression": Compression.powersgd(rank=4, start_step=0)},
}


def main() -> None:
    """Train by each method for some steps, and record the times of the later ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a model for a processor, to try the measurement")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--minutes", type=float, default=2.0, help="begin no method after so many")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    comm, record = as_communicator(MPI.COMM_WORLD), Record(options.out)
    size, device = SMALL if options.small else HUNDRED_MILLION, torch.device(options.device)
    text = Text.read(device, size.text_bytes)
    if comm.rank == 0:
        record.start()
    until = time.monotonic() + 60 * options.minutes
    for method, settings in METHODS.items():
        if any(comm.allgather_object(time.monotonic() > until, "until")):
            break
        row = _row(method, settings, comm, size, text, options.steps)
        if comm.rank == 0:
            record.append(row)


def _row(method: str, settings: Any, comm: Communicator, size: Size, text: Text, steps: int) -> Row:
    device = text.train.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    torch.manual_seed(0)
    model = Language(size).to(device)
    numel = sum(parameter.numel() for parameter in model.parameters())
    row = {"device": name, "op": "training", "impl": method, "d": numel, "ranks": comm.size}
    row["when"] = time.strftime("%Y-%m-%d %H:%M")
    try:
        return row | _trained(model, _optimizer(model, settings, comm, size), comm, size, text, steps)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}"[:2000]}


def _optimizer(model: Language, settings: Any, comm: Communicator, size: Size) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate)
    if settings is None:
        return optimizer
    if settings:
        return DistributedOptimizer(optimizer, model.named_parameters(), comm=comm, **settings)
    return _Dense(optimizer, model, comm)


class _Dense:
    """Averages whole gradients before each step."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: Language, comm: Communicator) -> None:
        self._optimizer, self._named = optimizer, dict(model.named_parameters())
        layout = Layout.of(self._named.items(), lambda name, parameter: False)
        device = next(model.parameters()).device
        self.exchange = DenseExchange(layout, comm, average=True, device=device)
        index = layout.index()
        self._places = {index[name]: parameter for name, parameter in self._named.items()}

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        gradients = {at: parameter.grad for at, parameter in self._places.items() if parameter.grad is not None}
        self.exchange.submit_many(gradients)
        self.exchange.run()
        self.exchange.write_update(gradients)
        self._optimizer.step()


def _trained(model: Language, optimizer: Any, comm: Communicator, size: Size, text: Text, steps: int) -> Row:
    generator = torch.Generator().manual_seed(comm.rank)
    whole, compute = list[float](), list[float]()
    bytes_before, phases_before = 0, dict[str, float]()
    for step in range(steps):
        if step == steps // 2:  # what comes before compiles, records and fills the memory
            whole.clear()
            compute.clear()
            bytes_before, phases_before = comm.bytes_sent, dict(_phases(optimizer))
        batch = text.batch(generator, size.batch, size.context)
        comm.allgather_object(None, "together")
        _wait(text.train.device)
        start = time.perf_counter()
        optimizer.zero_grad()
        with getattr(optimizer, "step_ahead", nullcontext)():
            loss_of(model, batch).backward()
        _wait(text.train.device)
        compute.append(time.perf_counter() - start)
        optimizer.step()
        _wait(text.train.device)
        whole.append(time.perf_counter() - start)
    sent = comm.bytes_sent - bytes_before
    phases = {name: (spent - phases_before.get(name, 0.0)) / len(whole) for name, spent in _phases(optimizer).items()}
    return {
        "seconds": statistics.median(whole),
        "host_seconds": statistics.median(whole),
        "compute_seconds": statistics.median(compute),
        "bytes_per_step": sent // len(whole),
        "phases": phases,
        "peak_bytes": torch.cuda.max_memory_allocated() if text.train.device.type == "cuda" else None,
    }


def _phases(optimizer: Any) -> dict[str, float]:
    seconds: dict[str, float] = optimizer.exchange.stats.seconds if hasattr(optimizer, "exchange") else {}
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
