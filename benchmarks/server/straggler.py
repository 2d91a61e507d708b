"""Eight workers of which one is slow: methods that wait for it beside methods that do not, on a clock of its own.

``python -m benchmarks.server.straggler --seeds 0 1``

In one process: a step of a fast worker takes one unit of time, the exchange of messages none, which favours those that
exchange the most. The store, its rules and its codes are those of real ranks; the methods without a server are written
out here. Every method has the learning rate, of six, that ends lowest where the slow worker is five times slower.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.server import rows
from benchmarks.server.crew import Crew
from benchmarks.server.digits import Digits, loss_of, network, split
from benchmarks.server.rows import Row
from hvd_sketch import Compression
from hvd_sketch.methods.flat import Flat, FlatModel
from hvd_sketch.methods.server import FedAsync, Plain, Rule
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.message import HEADER, Header, Kind
from hvd_sketch.methods.server.rules.tiers import Tiers
from hvd_sketch.methods.server.sparse_codes import sparse_code
from hvd_sketch.methods.server.store import Replies, Store
from hvd_sketch.methods.server.validation import Served

WORKERS, SLOW = 8, 0
HORIZON, MOMENTS, BATCH = 200.0, 20, 32
FACTORS, RATES = (1.0, 5.0, 20.0), (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
TUNED_AT = {"factor": 5.0, "seed": 99}

SPARSE = Compression.topk(ratio=20.0, warmup_steps=0, clip_norm=None, dense_below=0)

Moment = tuple[float, Tensor, float]
"""When, the model that counts, and the bytes sent and received by the server, or else by one worker."""


class Task(NamedTuple):
    """What is trained, and how."""

    shares: list[Digits]
    model: torch.nn.Module
    parameters: FlatModel
    start: Flat
    factor: float
    rate: float
    seed: int

    def crew(self, period: int, proximal: float = 0.0) -> Crew:
        """The workers."""
        layout, rate = self.parameters.layout, self.rate
        return Crew(layout, self.shares, rate=rate, period=period, batch=BATCH, proximal=proximal, seed=self.seed)

    def seconds(self, worker: int, period: int) -> float:
        """What so many steps take."""
        return period * (self.factor if worker == SLOW else 1.0)

    @property
    def nbytes(self) -> int:
        """Of the model."""
        return self.start.vector.nbytes


def task_of(cell: Row, rate: float, shares: list[Digits] | None = None) -> Task:
    """A fresh one; each worker has an eighth of the data unless shares are given."""
    model = network(cell["seed"])
    parameters = FlatModel(torch.optim.SGD(model.parameters()), model, SPARSE.layout)
    start = parameters.new()
    parameters.read(start)
    eighths = [split().workers.at(slice(number, None, WORKERS)) for number in range(WORKERS)]
    return Task(shares or eighths, model, parameters, start, cell["factor"], rate, cell["seed"])


def together(period: int) -> Callable[[Task], Iterator[Moment]]:
    """The mean of what all did in so many steps: an allreduce of gradients at 1, else local SGD."""

    def method(task: Task) -> Iterator[Moment]:
        crew, x, now, sent = task.crew(period), task.start.vector, 0.0, 0.0
        while now < HORIZON:
            for worker in range(WORKERS):
                crew.begin(worker, x.clone())
            x.sub_(torch.stack([crew.update(worker) for worker in range(WORKERS)]).mean(0))
            now += task.seconds(SLOW, period)
            sent += 4 * task.nbytes * (WORKERS - 1) / WORKERS  # a ring's, out and in
            yield now, x, sent

    return method


def swarm(task: Task, period: int = 4) -> Iterator[Moment]:
    """Non-blocking SwarmSGD in full precision; see `hvd_sketch.SwarmSGD`."""
    crew, published, choice, sent = task.crew(period), {}, random.Random(task.seed), 0.0
    due = [(task.seconds(worker, period), worker) for worker in range(WORKERS)]
    for worker in range(WORKERS):
        published[worker] = task.start.vector.clone()
        crew.begin(worker, published[worker].clone())
    heapq.heapify(due)
    while due[0][0] < HORIZON:
        now, worker = heapq.heappop(due)
        other = choice.choice([number for number in range(WORKERS) if number != worker])
        published[other] = (published[worker] + published[other]) / 2
        published[worker] = published[other] - crew.update(worker)
        crew.begin(worker, published[worker].clone())
        heapq.heappush(due, (now + task.seconds(worker, period), worker))
        sent += 4 * task.nbytes / WORKERS  # two nodes send and receive a model
        yield now, torch.stack(list(published.values())).mean(0), sent


def served(make: Callable[[], Rule], period: int = 1, sparse: bool = False, proximal: float = 0.0) -> Any:
    """With a server, compressed both ways with error reset if it is sparse."""

    def method(task: Task) -> Iterator[Moment]:
        layout, x = task.parameters.layout, task.start.vector
        code: Code = Whole(layout.total, torch.float32)
        if sparse:
            code = sparse_code(SPARSE, layout)
        samples = {number: len(share.labels) for number, share in enumerate(task.shares)}
        workers = Served(layout, task.model, samples)
        store = Store(x, make(), workers, up=code, down=code if sparse else None)
        return exchange(store, Side(task.crew(period, proximal), code, layout.total), task, period)

    return method


class Side:
    """The workers' side of the protocol: what each holds, and what it has not sent yet."""

    def __init__(self, crew: Crew, code: Code, count: int) -> None:
        self._crew, self._code = crew, code
        self._held = dict.fromkeys(range(WORKERS), torch.zeros(count))
        self._unsent = {worker: torch.zeros(count) for worker in range(WORKERS)}
        self._versions: dict[int, int] = {}

    def adopt(self, worker: int, message: Tensor) -> None:
        """Take the server's answer, and go on from there and what is unsent."""
        header, payload, _ = Header.read(message)
        self._versions[worker] = header.number
        if header.code == Whole.number:
            self._held[worker] = payload.view(torch.float32).clone()
        else:
            self._code.add(payload, self._held[worker])
        self._crew.begin(worker, self._held[worker] - self._unsent[worker])

    def push(self, worker: int) -> tuple[Header, Tensor]:
        """What it sends."""
        payload = self._code.encode(self._unsent[worker].add_(self._crew.update(worker)), 0)
        return Header(Kind.PUSH, self._versions[worker], self._code.number), payload


def exchange(store: Store, side: Side, task: Task, period: int) -> Iterator[Moment]:
    """Pushes as they come, until the time is over."""
    due: list[tuple[float, int]] = []
    sent = 0

    def deliver(replies: Replies, now: float) -> int:
        for worker, message in replies:
            side.adopt(worker, message)
            heapq.heappush(due, (now + task.seconds(worker, period), worker))
        return sum(message.numel() for _, message in replies)

    for worker in range(WORKERS):
        sent += deliver(store.join(worker, 0, True, 0.0), 0.0)
    while due[0][0] < HORIZON:
        now, worker = heapq.heappop(due)
        header, payload = side.push(worker)
        sent += payload.numel() + HEADER + deliver(store.push(worker, header, payload, True, now), now)
        yield now, store.model, sent


METHODS: dict[str, Callable[[Task], Iterator[Moment]]] = {
    "allreduce": together(1),
    "local SGD, 8 steps": together(8),
    "SwarmSGD, 4 steps": swarm,
    "AsyncSGD": served(Plain),
    "AsyncSGD, 1/20 both ways": served(Plain, sparse=True),
    "FedAsync, 4 steps": served(lambda: FedAsync(alpha=0.3), period=4),
    "FedAT, 3 tiers, 4 steps": served(lambda: Tiers(3, weights="samples"), period=4, proximal=0.1),
}


def run(cell: Row, rate: float) -> Row:
    """The loss on the test images at evenly spread moments."""
    task = task_of(cell, rate)
    losses: list[float] = []
    shown, megabytes = task.parameters.new(), 0.0
    for now, model, sent in METHODS[cell["method"]](task):
        while len(losses) < MOMENTS and now >= (len(losses) + 1) * HORIZON / MOMENTS:
            losses.append(_loss(task, shown))
        shown.vector.copy_(model)
        megabytes = sent / 1e6
    losses += [_loss(task, shown)] * (MOMENTS - len(losses))
    return {"rate": rate, "losses": losses, "megabytes": round(megabytes, 3)}


@torch.no_grad()
def _loss(task: Task, shown: Flat) -> float:
    task.parameters.write(shown)
    loss = float(loss_of(task.model, split().test))
    return loss if loss == loss else float("inf")


@cache
def best_rate(method: str) -> float:
    """Of six, the one that ends lowest."""
    return min(RATES, key=lambda rate: float(run({"method": method, **TUNED_AT}, rate)["losses"][-1]))


def main() -> None:
    """Measure what is missing."""
    options = rows.parser(__doc__).parse_args()
    cells = rows.grid(method=METHODS, factor=FACTORS, seed=options.seeds)
    rows.fill("straggler", cells, lambda cell: run(cell, best_rate(cell["method"])), options.results)


if __name__ == "__main__":
    main()
