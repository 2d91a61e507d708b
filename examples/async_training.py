"""Train a small character model with a server, and with methods that have none, one worker being slow.

    mpi_scripts/swarm.sh 9 examples/async_training.py --straggler 5 --results runs/five.json
    python examples/async_picture.py server.png runs/one.json runs/five.json runs/twenty.json

Rank 0 is the server, all others are workers, rank 1 the slow one. A step takes at least ``--step-seconds``, mostly
asleep, so that more ranks than cores behave like nodes with a processor each. All methods train for ``--seconds`` from
the same weights on the same shares of the data: those that wait for each other as many steps as the slowest can do,
the others by the clock. Models are put aside at fixed moments and looked at afterwards, so nobody waits for that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from async_picture import Curve
from char_transformer import SYMBOLS, encode, source_files
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hvd_sketch as hvd
from hvd_sketch.methods.server import FedAsync, Rule
from hvd_sketch.methods.swarm.lattice import Lattice

WORLD = MPI.COMM_WORLD
SERVER, SLOW = 0, 1
CONTEXT = 12  # characters that the model sees
WARMUP = 20  # steps in which the learning rate grows
VALIDATION_WINDOWS = 4096


class CharMLP(nn.Sequential):
    """The next character from the last twelve: two layers, 40 thousand parameters."""

    def __init__(self, width: int = 128, letters: int = 16) -> None:
        super().__init__(
            nn.Embedding(SYMBOLS, letters),
            nn.Flatten(),
            nn.Linear(CONTEXT * letters, width),
            nn.ReLU(),
            nn.Linear(width, SYMBOLS),
        )


@dataclass
class Log:
    """What one rank did: its steps, and its model, or the server's, at the moments, with the bytes sent by then."""

    options: argparse.Namespace
    model: nn.Module
    sent: Callable[[], int]
    models: list[Tensor] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    steps: int = 0
    start: float = 0.0
    _began: float = 0.0

    def until(self, count: int | None = None) -> Iterator[int]:
        """So many steps, or as many as fit into the time."""
        while (self.steps < count) if count is not None else (self._seconds() < self.options.seconds):
            self._began = time.monotonic()
            yield self.steps
            done = self.steps / count if count is not None else self._seconds() / self.options.seconds
            self.put_aside(done)

    def pace(self) -> None:
        """Wait until this worker's gradient would be ready."""
        slowness = self.options.straggler if WORLD.rank == SLOW else 1.0
        time.sleep(max(0.0, self._began + slowness * self.options.step_seconds - time.monotonic()))
        self.steps += 1

    def put_aside(self, done: float | None = None) -> None:
        """Keep the model for every moment that has passed, of which the share ``done`` has."""
        share = self._seconds() / self.options.seconds if done is None else done
        while len(self.models) < min(self.options.moments, int(share * self.options.moments + 1e-9)):
            self.models.append(parameters_to_vector(self.model.parameters()).detach().clone())
            self.bytes.append(self.sent())

    def _seconds(self) -> float:
        return time.monotonic() - self.start


def train(log: Log, optimizer: torch.optim.Optimizer, text: Tensor, lr: float, batches: Iterator[int]) -> None:
    """The loop is the same for all methods."""
    generator = torch.Generator().manual_seed(log.options.seed * WORLD.size + WORLD.rank)
    for step in batches:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP)
        starts = torch.randint(len(text) - CONTEXT, (log.options.batch_size,), generator=generator)
        optimizer.zero_grad()
        loss_of(log.model, text, starts).backward()
        log.pace()
        optimizer.step()


def with_server(make: Callable[..., Any], **settings: Any) -> Callable[..., Log]:
    """A method with a server: all ranks by the clock, the server's model is what counts."""

    def method(options: argparse.Namespace, model: nn.Module, sgd: Any, text: Tensor, lr: float, _: Any) -> Log:
        log = Log(options, model, lambda: optimizer.stats.bytes_sent + optimizer.stats.bytes_received)

        def look(version: int) -> None:
            with optimizer.server_model():
                log.put_aside()

        optimizer = make(sgd, model, WORLD, on_change=look, **settings)
        WORLD.barrier()
        log.start = time.monotonic()
        with optimizer:
            train(log, optimizer, text, lr, optimizer.work(log.until()))
        if WORLD.rank == SERVER:
            log.put_aside(1.0)
        return log

    return method


def without(make: Callable[..., Any], by_clock: bool = False) -> Callable[..., Log]:
    """A method of the workers alone: the mean of their models is what counts; the server's rank sleeps."""

    def method(options: argparse.Namespace, model: nn.Module, sgd: Any, text: Tensor, lr: float, workers: Any) -> Log:
        log = Log(options, model, lambda: sent(optimizer))
        count = None if by_clock else int(options.seconds / (options.straggler * options.step_seconds))
        WORLD.barrier()
        if WORLD.rank == SERVER:
            time.sleep(options.seconds)
            return log
        optimizer = make(sgd, model, workers)
        workers.barrier()
        log.start = time.monotonic()
        train(log, optimizer, text, lr, log.until(count))
        log.put_aside(1.0)
        if by_clock:
            optimizer.finish()
        return log

    return method


def sent(optimizer: Any) -> int:
    """Bytes that this rank has sent and received; as many both ways."""
    stats = optimizer.exchange.stats if hasattr(optimizer, "exchange") else optimizer.stats
    return 2 * int(stats.bytes_sent)


def allreduce(sgd: Any, model: nn.Module, workers: Any) -> Any:
    """Plain synchronous SGD."""
    for parameter in model.parameters():
        workers.Bcast(parameter.detach().numpy())
    return hvd.DistributedOptimizer(
        sgd, named_parameters=model.named_parameters(), comm=workers, compression=hvd.Compression.none
    )


def local(sgd: Any, model: nn.Module, workers: Any) -> Any:
    """An average of all models every eight steps."""
    return hvd.LocalSGD(sgd, model, workers, period=8)


def swarm(sgd: Any, model: nn.Module, workers: Any) -> Any:
    """Averages of two models every four steps, in eight bits."""
    return hvd.SwarmSGD(sgd, model=model, comm=workers, local_steps=4, quantization=Lattice(8))


def fedasync(*arguments: Any, **settings: Any) -> Any:
    """Models of four steps, mixed in by their staleness."""
    rule: Rule = FedAsync(alpha=0.3)
    return hvd.AsyncSGD(*arguments, rule=rule, period=4, **settings)


def fedat(*arguments: Any, **settings: Any) -> Any:
    """Three tiers, rounds of four steps."""
    return hvd.FedAT(*arguments, tiers=3, period=4, proximal=0.1, weights="samples", **settings)


SPARSE = hvd.Compression.topk(ratio=20.0, warmup_steps=0, clip_norm=None, dense_below=0)
METHODS: dict[
    str, tuple[Callable[..., Log], float, float]
] = {  # learning rate and momentum, tuned for a worker that is 5 times slower
    "allreduce": (without(allreduce), 0.4, 0.9),
    "local": (without(local), 0.2, 0.9),
    "swarm": (without(swarm, by_clock=True), 0.2, 0.9),
    "async": (with_server(hvd.AsyncSGD), 0.2, 0.0),
    "async, 1/20": (with_server(hvd.AsyncSGD, up=SPARSE, down=SPARSE), 0.2, 0.0),
    "fedasync": (with_server(fedasync), 0.4, 0.9),
    "fedat": (with_server(fedat), 0.4, 0.9),
}
"""Each with the learning rate and the momentum that are best where one worker is five times slower."""


def loss_of(model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    """Mean cross entropy in nats per character."""
    rows = text.unfold(0, CONTEXT + 1, 1)[starts].long()
    return F.cross_entropy(model(rows[:, :-1]), rows[:, -1])


def curve_of(name: str, log: Log, text: Tensor) -> Curve:
    """On the server's rank the losses at every moment, of its own model or of the mean of the workers'."""
    options = log.options
    moments = [options.seconds * (i + 1) / options.moments for i in range(options.moments)]
    everybody = WORLD.gather((log.steps, log.models, log.bytes))
    curve = Curve(name, {key: str(value) for key, value in vars(options).items()}, moments)
    if everybody is None:
        return curve
    kept = [(models, counted) for _, models, counted in everybody[:1] if models] or [
        (models, counted) for _, models, counted in everybody[1:]
    ]
    starts = torch.linspace(0, len(text) - CONTEXT - 1, VALIDATION_WINDOWS).long()
    for models in zip(*(models for models, _ in kept), strict=True):
        vector_to_parameters(torch.stack(models).mean(0), log.model.parameters())
        with torch.no_grad():
            curve.loss.append(float(loss_of(log.model, text, starts)))
    curve.megabytes = [max(row) / 1e6 for row in zip(*(counted for _, counted in kept), strict=True)]
    curve.steps = [steps for steps, _, _ in everybody[1:]]
    return curve


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--methods", choices=tuple(METHODS), nargs="+", default=list(METHODS), metavar="NAME", help="what to train")
    add("--seconds", type=float, default=40.0, help="training time of each method")
    add("--step-seconds", type=float, default=0.1, help="least time of a step, sleep included")
    add("--straggler", type=float, default=5.0, help="how many times slower rank 1 is")
    add("--lr", type=float, help="learning rate, in place of each method's own")
    add("--momentum", type=float, help="likewise")
    add("--batch-size", type=int, default=32, help="windows a worker and step")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--moments", type=int, default=20, help="how often to look at the model")
    add("--results", type=Path, metavar="FILE.json", help="write the curves")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Train with each method, then tell and write."""
    workers = WORLD.Split(WORLD.rank == SERVER)
    training, validation = source_files()
    text = encode(training[max(WORLD.rank - 1, 0) :: WORLD.size - 1])
    curves = []
    for name in options.methods:
        method, lr, momentum = METHODS[name]
        torch.manual_seed(options.seed)
        model = CharMLP()
        sgd = torch.optim.SGD(
            model.parameters(), lr=1.0, momentum=momentum if options.momentum is None else options.momentum
        )
        log = method(options, model, sgd, text, lr if options.lr is None else options.lr, workers)
        curve = curve_of(name, log, encode(validation))
        curves.append(curve)
        if WORLD.rank == SERVER:
            print(
                f"{name}: loss {curve.loss[-1]:.3f}, steps {curve.steps}, {curve.megabytes[-1]:.1f} MB by the busiest",
                flush=True,
            )
    if WORLD.rank == SERVER and options.results is not None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps([asdict(curve) for curve in curves]) + "\n")


if __name__ == "__main__":
    main(options())
