"""Ten workers, of which some are hostile: every rule under every attack.

``mpirun -np 11 --map-by slot:OVERSUBSCRIBE --bind-to none python -m benchmarks.server.attacks --seeds 0 1``

Rank 0 is the server. Hostile workers are the last ones. Those that know everything read the last update of every
honest worker from shared memory. Every worker pushes as often, so all rules see the same number of gradients.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

import hvd_sketch as hvd
from benchmarks.server import rows
from benchmarks.server.digits import CLASSES, Digits, accuracy, loss_of, network, split
from benchmarks.server.rows import Row
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

WORLD = MPI.COMM_WORLD
WORKERS = WORLD.size - 1
PUSHES, PERIOD, BATCH = 120, 4, 64  # of each worker
RATES = {"plain": 0.05, "Zeno++": 0.1, "ZenoPS async": 0.1}
SYNCHRONOUS_RATE = 0.3
"""The workers' learning rates: a mean of ten allows more than ten pushes one after the other."""
HOSTILE = (0, 2, 4, 6, 8)
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
ATTACKS = ("label flip", "sign x 10", "Gaussian", "ALIE", "IPM")


class Honest:
    """What honest workers sent last, in memory that all ranks of this machine share."""

    def __init__(self, path: Path, count: int, worker: int) -> None:
        self._rows = np.memmap(path, np.float32, "r+", shape=(WORKERS, count))
        self._worker = worker

    def __call__(self, update: Tensor) -> Tensor:
        """Put an honest update down."""
        self._rows[self._worker] = update.numpy()
        return update

    def of(self, honest: int) -> Callable[[], Tensor]:
        """Those of the first workers."""
        return lambda: torch.from_numpy(np.array(self._rows[:honest]))


def attack_of(name: str, honest: Honest, hostile: int, seed: int) -> Callable[[Tensor], Tensor]:
    """What a hostile worker does to its updates; flipped labels are in its data."""
    z = little_enough(WORKERS, hostile) if hostile <= WORKERS // 2 else MAJORITY_Z
    attacks: dict[str, Callable[[Tensor], Tensor]] = {
        "label flip": lambda update: update,
        "sign x 10": SignFlip(10.0),
        "Gaussian": Gaussian(200.0, seed),
        "ALIE": ALittleIsEnough(honest.of(WORKERS - hostile), z),
        "IPM": InnerProduct(honest.of(WORKERS - hostile), 0.5),
    }
    return attacks[name]


def run(cell: Row, shared: Path) -> Row:
    """Train once; what the server's model reads correctly, and whom the rule refused."""
    data, model = split(), network(cell["seed"])
    worker, hostile = WORLD.rank - 1, cell["hostile"]
    is_hostile = worker >= WORKERS - hostile
    mine = data.workers.at(slice(max(worker, 0), None, WORKERS))
    if is_hostile and cell["attack"] == "label flip":
        mine = Digits(mine.images, flip_labels(mine.labels, CLASSES))
    honest = Honest(shared, sum(parameter.numel() for parameter in model.parameters()), max(worker, 0))
    outgoing = attack_of(cell["attack"], honest, hostile, WORLD.rank) if is_hostile else honest
    rule = RULES[cell["rule"]](lambda network, number: loss_of(network, data.trusted))
    sgd = torch.optim.SGD(model.parameters(), lr=RATES.get(cell["rule"], SYNCHRONOUS_RATE))
    optimizer = hvd.AsyncSGD(sgd, model, WORLD, rule=rule, period=PERIOD, outgoing=[outgoing], patience=120.0)
    generator = torch.Generator().manual_seed(1000 * cell["seed"] + WORLD.rank)
    with optimizer:
        for _ in optimizer.work(range(PUSHES * PERIOD)):
            optimizer.zero_grad()
            loss_of(model, mine.batch(generator, BATCH)).backward()
            optimizer.step()
    return {"accuracy": accuracy(model, data.test), **verdicts(optimizer.stats, hostile)}


def verdicts(stats: ServerStats, hostile: int) -> Row:
    """Shares of the honest pushes that were refused, and of the hostile ones that were not."""
    counts = [counted for _, counted in sorted(stats.workers.items())]
    honest, others = counts[: len(counts) - hostile], counts[len(counts) - hostile :]
    refused = sum(counted.refused for counted in honest) / max(1, sum(counted.pushes for counted in honest))
    missed = sum(counted.accepted for counted in others) / max(1, sum(counted.pushes for counted in others))
    return {"refused": refused, "missed": missed if others else math.nan}


def trusted_alone(seed: int) -> Row:
    """The reference: as many steps as all workers take together, on the trusted data and nothing else."""
    data, model = split(), network(seed)
    generator = torch.Generator().manual_seed(seed)
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
        for seed in seeds
        for hostile in HOSTILE
        for attack in (ATTACKS if hostile else ATTACKS[1:2])
        for rule in RULES
    ]


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    todo: list[Row] = WORLD.bcast(rows.missing("attack", cells(options.seeds), options.results))
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        file.truncate(WORKERS * sum(p.numel() for p in network(0).parameters()) * 4)
        shared = Path(WORLD.bcast(file.name))
        for cell in todo:
            measured = run(cell, shared)
            if WORLD.rank == 0:
                rows.add("attack", cell, measured, options.results)
                print(cell, measured, flush=True)
        WORLD.barrier()
    if WORLD.rank == 0:
        for cell in rows.missing("trusted alone", [{"seed": seed} for seed in options.seeds], options.results):
            rows.add("trusted alone", cell, trusted_alone(cell["seed"]), options.results)


if __name__ == "__main__":
    main()
