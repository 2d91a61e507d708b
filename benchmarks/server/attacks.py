"""Ten workers, of which some are hostile: every rule under every attack.

``python -m benchmarks.server.attacks --seeds 0 1``

In one process and on a clock of its own: the server's store and the workers' side of the protocol are those of real
ranks, without the messages between them. A worker takes a time of its own for every push, up to a fifth more or less
than the others, so pushes arrive in a random order and stale. Hostile workers are the last ones. Those that know
everything read the last update of every honest worker. Every worker pushes as often, so all rules see the same number
of gradients.
"""

from __future__ import annotations

import heapq
import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.server import rows
from benchmarks.server.crew import Crew
from benchmarks.server.digits import CLASSES, Digits, accuracy, loss_of, network, split
from benchmarks.server.rows import Row
from hvd_sketch.layout import Layout
from hvd_sketch.methods.flat import FlatModel
from hvd_sketch.methods.server import (
    Krum,
    Mean,
    Median,
    Plain,
    Rule,
    ServerStats,
    TrimmedMean,
    Zeno,
    ZenoPlus,
    ZenoPS,
    ZenoPSAsync,
)
from hvd_sketch.methods.server.attacks import (
    ALittleIsEnough,
    Gaussian,
    InnerProduct,
    SignFlip,
    flip_labels,
    little_enough,
)
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.message import Header, Kind
from hvd_sketch.methods.server.store import Replies, Store
from hvd_sketch.methods.server.validation import Served
from hvd_sketch.methods.server.worker import Transform

WORKERS = 10
PUSHES, PERIOD, BATCH = 60, 4, 32  # of each worker
RATES = {"plain": 0.03, "Zeno++": 0.2, "ZenoPS async": 0.1}
SYNCHRONOUS_RATE = 0.3
"""The workers' learning rates: a mean of ten allows more than ten pushes one after the other."""
HOSTILE: Sequence[int] = (0, 2, 4, 6, 8)
MAJORITY_Z = 1.5  # of ALIE, where hostile workers need nobody else for a majority

RULES: dict[str, Callable[[Any], Rule]] = {
    "plain": lambda validate: Plain(),
    "Zeno++": lambda validate: ZenoPlus(validate, refresh=3, rate=0.2, rho=0.002, max_staleness=3 * WORKERS),
    "ZenoPS async": lambda validate: ZenoPSAsync(
        validate, rate=RATES["ZenoPS async"], steps=PERIOD, refresh=3, max_staleness=3 * WORKERS
    ),
    "mean": lambda validate: Mean(),
    "median": lambda validate: Median(),
    "trimmed mean": lambda validate: TrimmedMean(4),
    "Krum": lambda validate: Krum(3),
    "Zeno": lambda validate: Zeno(validate, 8),
    "ZenoPS": lambda validate: ZenoPS(validate, rate=SYNCHRONOUS_RATE, steps=PERIOD),
}
ATTACKS: Sequence[str] = ("label flip", "sign x 10", "Gaussian", "ALIE", "IPM")


class Honest:
    """What honest workers sent last, a row each."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def of(self, worker: int) -> Transform:
        """Puts an honest update down."""

        def keep(update: Tensor) -> Tensor:
            self._rows[worker] = update
            return update

        return keep

    def first(self, count: int) -> Callable[[], Tensor]:
        """Those of the first workers."""
        return lambda: self._rows[:count].clone()


def attack_of(name: str, honest: Honest, hostile: int, seed: int) -> Transform:
    """What a hostile worker does to its updates; flipped labels are in its data."""
    z = little_enough(WORKERS, hostile) if hostile <= WORKERS // 2 else MAJORITY_Z
    attacks: dict[str, Transform] = {
        "label flip": lambda update: update,
        "sign x 10": SignFlip(10.0),
        "Gaussian": Gaussian(200.0, seed),
        "ALIE": ALittleIsEnough(honest.first(WORKERS - hostile), z),
        "IPM": InnerProduct(honest.first(WORKERS - hostile), 0.5),
    }
    return attacks[name]


def share_of(number: int, *, flipped: bool) -> Digits:
    """A worker's data."""
    share = split().workers.at(slice(number, None, WORKERS))
    return Digits(share.images, flip_labels(share.labels, CLASSES)) if flipped else share


class Workers:
    """The workers' side of the protocol.

    Args:
        cell: of the table.
        layout: of the parameters.
    """

    def __init__(self, cell: Row, layout: Layout) -> None:
        hostile, attack, seed = cell["hostile"], cell["attack"], cell["seed"]
        bad = range(WORKERS - hostile, WORKERS)
        shares = [share_of(number, flipped=attack == "label flip" and number in bad) for number in range(WORKERS)]
        honest, rate = Honest(torch.zeros(WORKERS, layout.total)), RATES.get(cell["rule"], SYNCHRONOUS_RATE)
        self._outgoing = [
            attack_of(attack, honest, hostile, number) if number in bad else honest.of(number)
            for number in range(WORKERS)
        ]
        self._crew = Crew(layout, shares, rate=rate, period=PERIOD, batch=BATCH, seed=seed)
        self._versions: dict[int, int] = {}
        self.left = dict.fromkeys(range(WORKERS), PUSHES)

    def adopt(self, number: int, message: Tensor) -> None:
        """A worker takes the server's answer."""
        header, payload, _ = Header.read(message)
        self._versions[number] = header.number
        self._crew.begin(number, payload.view(torch.float32))

    def push(self, number: int) -> tuple[Header, Tensor]:
        """What a worker sends after its local steps."""
        update = self._outgoing[number](self._crew.update(number))
        self.left[number] -= 1
        return Header(Kind.PUSH, self._versions[number], Whole.number), update.view(torch.uint8)


def run(cell: Row) -> Row:
    """Train once; what the server's model reads correctly, and whom the rule refused."""
    data, model = split(), network(cell["seed"])
    parameters = FlatModel(torch.optim.SGD(model.parameters()), model)
    rule, start = RULES[cell["rule"]](lambda network, number: loss_of(network, data.trusted)), parameters.new()
    parameters.read(start)
    served = Served(parameters.layout, model, dict.fromkeys(range(WORKERS), 1))
    store = Store(start.vector, rule, served, up=Whole(parameters.layout.total, parameters.dtype), down=None)
    exchange(store, Workers(cell, parameters.layout), random.Random(cell["seed"]))
    parameters.write(start)
    return {"accuracy": accuracy(model, data.test), **verdicts(store.stats, cell["hostile"])}


def exchange(store: Store, workers: Workers, pace: random.Random) -> None:
    """Let all workers push until they are done, by a clock of its own."""
    due: list[tuple[float, int]] = []

    def deliver(replies: Replies, now: float) -> None:
        for number, message in replies:
            workers.adopt(number, message)
            if workers.left[number]:
                heapq.heappush(due, (now + pace.uniform(0.8, 1.2), number))
            else:
                deliver(store.leave(number, False, now), now)

    for number in range(WORKERS):
        deliver(store.join(number, 0, True, 0.0), 0.0)
    while due:
        now, number = heapq.heappop(due)
        deliver(store.push(number, *workers.push(number), True, now), now)


def verdicts(stats: ServerStats, hostile: int) -> Row:
    """Shares of the honest pushes that were refused, and of the hostile ones that were not."""
    counts = [counted for _, counted in sorted(stats.workers.items())]
    honest, others = counts[: len(counts) - hostile], counts[len(counts) - hostile :]
    refused = sum(counted.refused for counted in honest) / max(1, sum(counted.pushes for counted in honest))
    missed = sum(counted.accepted for counted in others) / max(1, sum(counted.pushes for counted in others))
    return {"refused": refused, "missed": missed if others else math.nan}


def trusted_alone(cell: Row) -> Row:
    """The reference: as many steps as all workers take together, on the trusted data and nothing else."""
    data, model = split(), network(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    sgd = torch.optim.SGD(model.parameters(), lr=RATES["Zeno++"])
    for _ in range(PUSHES * PERIOD * WORKERS):
        sgd.zero_grad()
        loss_of(model, data.trusted.batch(generator, BATCH)).backward()
        sgd.step()
    return {"accuracy": accuracy(model, data.test)}


def cells(seeds: list[int]) -> list[Row]:
    """Without hostile workers there is no attack."""
    return [
        {"rule": rule, "attack": attack, "hostile": hostile, "seed": seed}
        for hostile in HOSTILE
        for seed in seeds
        for attack in (ATTACKS if hostile else ATTACKS[1:2])
        for rule in RULES
    ]


def main() -> None:
    """Measure what is missing."""
    options = rows.parser(__doc__).parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    rows.fill("attack", cells(options.seeds), run, options.results)
    rows.fill("trusted alone", rows.grid(seed=options.seeds), trusted_alone, options.results)


if __name__ == "__main__":
    main()
