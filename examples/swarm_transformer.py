"""Train the character transformer without an allreduce, one node being slow, and with one for as long.

    mpi_scripts/swarm.sh 8 examples/swarm_transformer.py --straggler 5 --plot swarm.png

Every step takes at least ``--step-seconds``, as on nodes that have a processor each, so that more ranks than cores
still behave like a cluster; rank 0 takes ``--straggler`` times as long. Both methods train for ``--seconds`` from the
same weights on the same shares of the data: the swarm by the clock, allreduce by as many steps as rank 0 can do in
that time. At fixed moments every rank puts its model aside; the mean loss and the spread of the models are computed
from those at the end, so nobody waits for an evaluation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from char_transformer import CONTEXT, CharTransformer, encode, source_files, windows
from mpi4py import MPI
from swarm_picture import Curve, draw
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hvd_sketch as hvd
from hvd_sketch.methods.swarm import Meeting, SwarmSGD
from hvd_sketch.methods.swarm.lattice import Lattice

WORLD = MPI.COMM_WORLD
WIDTH, LAYERS = 64, 2
LR_WARMUP = 50  # steps
VALIDATION_WINDOWS = 512


@dataclass
class Log:
    """What one rank did, with its models at the moments; times are ``time.time()``."""

    options: argparse.Namespace
    model: torch.nn.Module
    sent: Callable[[], int]
    models: list[Tensor] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    timeline: list[tuple[float, float]] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    start: float = 0.0
    _began: float = 0.0

    def steps(self, count: int | None = None) -> Iterator[int]:
        """So many steps, or as many as fit into the time; the moments divide them evenly."""
        WORLD.barrier()
        self.start = time.time()
        moments = self.options.moments
        while len(self.models) < moments:
            self._began = time.time()
            yield len(self.timeline)
            done = len(self.timeline) / count if count else (time.time() - self.start) / self.options.seconds
            while len(self.models) < min(moments, int(done * moments + 1e-9)):
                self._put_aside()

    def pace(self) -> None:
        """Wait until this node's gradient would be ready."""
        slowness = self.options.straggler if WORLD.rank == 0 else 1.0
        time.sleep(max(0.0, self._began + slowness * self.options.step_seconds - time.time()))
        self.timeline.append((self._began, time.time()))

    def _put_aside(self) -> None:
        self.models.append(parameters_to_vector(self.model.parameters()).detach().clone())
        self.bytes.append(self.sent())
        self.done.append(len(self.timeline))


def swarm(options: argparse.Namespace, model: torch.nn.Module, text: Tensor) -> Log:
    """Every rank trains until the time is over; the slow one does fewer steps."""
    log = Log(options, model, lambda: optimizer.stats.bytes_sent)
    optimizer = SwarmSGD(
        torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9),
        model=model,
        comm=WORLD,
        local_steps=options.local_steps,
        graph=options.graph,
        quantization=Lattice(options.bits) if options.bits < 32 else None,
        blocking=options.blocking,
        seed=options.seed,
        on_meeting=log.meetings.append,
    )
    with optimizer:
        train(log, optimizer, text, options.lr)
    return log


def allreduce(options: argparse.Namespace, model: torch.nn.Module, text: Tensor) -> Log:
    """As many steps as the slowest rank can do in the time; every one of them waits for it."""
    values = sum(parameter.numel() for parameter in model.parameters())
    log = Log(options, model, lambda: len(log.timeline) * 2 * (WORLD.size - 1) * 4 * values // WORLD.size)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    sgd = torch.optim.SGD(model.parameters(), lr=options.allreduce_lr, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters())
    count = int(options.seconds / (options.straggler * options.step_seconds))
    train(log, optimizer, text, options.allreduce_lr, count)
    return log


def train(log: Log, optimizer: torch.optim.Optimizer, text: Tensor, lr: float, count: int | None = None) -> None:
    """The loop is the same for both."""
    generator = torch.Generator().manual_seed(log.options.seed * WORLD.size + WORLD.rank)
    for step in log.steps(count):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / LR_WARMUP)
        starts = torch.randint(len(text) - CONTEXT, (log.options.batch_size,), generator=generator)
        optimizer.zero_grad()
        loss_of(log.model, text, starts).backward()
        log.pace()
        optimizer.step()


def loss_of(model: torch.nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    """Mean cross entropy in nats per character."""
    characters, following = windows(text, starts)
    return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())


def curve_of(label: str, log: Log, text: Tensor) -> Curve:
    """Loss of the mean model and spread at every moment, the same on all ranks; timelines on rank 0."""
    curve = Curve(label, settings_of(log.options), moments_of(log.options))
    starts = torch.linspace(0, len(text) - CONTEXT - 1, VALIDATION_WINDOWS).long()
    for mine in log.models:
        mean = torch.empty_like(mine)
        WORLD.Allreduce(mine.numpy(), mean.numpy())
        mean /= WORLD.size
        curve.spread.append((WORLD.allreduce(float((mine - mean).square().sum())) / WORLD.size) ** 0.5)
        vector_to_parameters(mean, log.model.parameters())
        with torch.no_grad():
            share = loss_of(log.model, text, starts[WORLD.rank :: WORLD.size])
        curve.loss.append(WORLD.allreduce(float(share)) / WORLD.size)
    curve.steps = [list(steps) for steps in zip(*WORLD.allgather(log.done), strict=True)]
    curve.megabytes = [[sent / 1e6 for sent in row] for row in zip(*WORLD.allgather(log.bytes), strict=True)]
    curve.timeline = WORLD.allgather([(began - log.start, ended - log.start) for began, ended in log.timeline])
    begun = [(meeting.partner, meeting.began, meeting.ended) for meeting in log.meetings if meeting.begun_here]
    curve.meetings = WORLD.allgather([(to, began - log.start, ended - log.start) for to, began, ended in begun])
    return curve


def moments_of(options: argparse.Namespace) -> list[float]:
    """Seconds since the start at which models are put aside."""
    return [options.seconds * (i + 1) / options.moments for i in range(options.moments)]


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """All options and the number of ranks, for the record."""
    return {"ranks": str(WORLD.size), **{name: str(value) for name, value in vars(options).items()}}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--methods", choices=("swarm", "allreduce"), nargs="+", default=["allreduce", "swarm"], help="what to train")
    add("--seconds", type=float, default=180.0, help="training time of each method")
    add("--step-seconds", type=float, default=0.2, help="least time of a step, sleep included")
    add("--straggler", type=float, default=5.0, help="how many times slower rank 0 is")
    add("--local-steps", type=int, default=4, help="local steps between two meetings that a node begins")
    add("--graph", default="complete", help="complete, ring, torus or hypercube")
    add("--bits", type=int, choices=(4, 8, 16, 32), default=8, help="of the lattice; 32: full precision")
    add("--blocking", action="store_true", help="the variant that waits for the partner's local steps")
    add("--lr", type=float, default=0.4, help="learning rate of the swarm")
    add("--allreduce-lr", type=float, default=0.8, help="learning rate of allreduce SGD")
    add("--batch-size", type=int, default=8, help="windows a rank and step")
    add("--seed", type=int, default=0, help="of the weights, the batches and the choice of partners")
    add("--moments", type=int, default=24, help="how often to look at the models")
    add("--results", type=Path, metavar="FILE.json", help="write the curves")
    add("--plot", type=Path, metavar="FILE.png", help="draw the curves, and the first seconds of the nodes")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Train with each method, then tell, write and draw."""
    training, validation = (
        encode(files) for files in (source_files()[0][WORLD.rank :: WORLD.size], source_files()[1])
    )
    curves = []
    for method in options.methods:
        torch.manual_seed(options.seed)
        model = CharTransformer(WIDTH, LAYERS)
        log = {"swarm": swarm, "allreduce": allreduce}[method](options, model, training)
        curves.append(curve_of(method, log, validation))
    if WORLD.rank:
        return
    for curve in curves:
        print(
            f"{curve.label}: loss {curve.loss[-1]:.3f}, spread {curve.spread[-1]:.3f}, steps {curve.steps[-1]}, "
            f"{max(curve.megabytes[-1]):.1f} MB sent by the busiest rank"
        )
    if options.results is not None:
        options.results.write_text(json.dumps([asdict(curve) for curve in curves]) + "\n")
    if options.plot is not None:
        draw(curves, options.plot)


if __name__ == "__main__":
    hvd.init()
    main(options())
