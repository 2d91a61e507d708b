"""Eight workers, of which one is five times slower and the only one that has seen an 8 or a 9.

``mpirun -np 9 --map-by slot:OVERSUBSCRIBE --bind-to none python -m benchmarks.server.classes --seeds 0 1``
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

import hvd_sketch as hvd
from benchmarks.server import rows
from benchmarks.server.digits import accuracy, loss_of, network, split
from benchmarks.server.rows import Row
from hvd_sketch.methods.server import FedAsync, Mean

WORLD = MPI.COMM_WORLD
SLOW, RARE = 1, 8  # classes from 8 on
PERIOD, RATE, BATCH = 4, 0.1, 32
STEP, SLOWNESS = 0.02, 5.0  # seconds


def fedat(weights: Any, published: bool = False) -> Callable[..., Any]:
    """Two tiers, the slow worker by itself."""

    def make(sgd: Any, model: Any, samples: int) -> Any:
        tiers = [list(range(2, WORLD.size)), [SLOW]]
        return hvd.FedAT(
            *(sgd, model, WORLD),
            period=PERIOD,
            tiers=tiers,
            samples=samples,
            weights=weights,
            published=published,
            proximal=0.1,
        )

    return make


METHODS: dict[str, Callable[..., Any]] = {
    "synchronous mean": lambda sgd, model, samples: hvd.AsyncSGD(sgd, model, WORLD, rule=Mean(), period=PERIOD),
    "AsyncSGD": lambda sgd, model, samples: hvd.AsyncSGD(sgd, model, WORLD, period=PERIOD),
    "FedAsync": lambda sgd, model, samples: hvd.AsyncSGD(sgd, model, WORLD, rule=FedAsync(alpha=0.3), period=PERIOD),
    "FedAT, mirror": fedat("mirror"),
    "FedAT, published": fedat("mirror", published=True),
    "FedAT, uniform": fedat("uniform"),
    "FedAT, samples": fedat("samples"),
}


def run(cell: Row, seconds: float) -> Row:
    """Train by the clock; what the server's model reads of the slow worker's classes and of the others."""
    data, model = split(), network(cell["seed"])
    rare = data.workers.labels >= RARE
    shares = [data.workers.at(~rare).at(slice(number, None, WORLD.size - 2)) for number in range(WORLD.size - 2)]
    mine = data.workers.at(rare) if WORLD.rank == SLOW else shares[max(WORLD.rank - 2, 0)]
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = METHODS[cell["method"]](sgd, model, len(mine.labels))
    generator = torch.Generator().manual_seed(1000 * cell["seed"] + WORLD.rank)
    pace = STEP * (SLOWNESS if WORLD.rank == SLOW else 1.0)
    with optimizer:
        for began in optimizer.work(clock(seconds)):
            optimizer.zero_grad()
            loss_of(model, mine.batch(generator, BATCH)).backward()
            time.sleep(max(0.0, began + pace - time.monotonic()))
            optimizer.step()
    seldom = data.test.labels >= RARE
    pushes = {rank: counted.accepted for rank, counted in optimizer.stats.workers.items()}
    return {
        "rare": accuracy(model, data.test.at(seldom)),
        "common": accuracy(model, data.test.at(~seldom)),
        "slow share": pushes.get(SLOW, 0) / max(1, sum(pushes.values())),
    }


def clock(seconds: float) -> Iterator[float]:
    """The moments at which steps begin, until the time is over."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        yield now


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    cells: list[Row] = [{"method": method, "seed": seed} for seed in options.seeds for method in METHODS]
    for cell in WORLD.bcast(rows.missing("classes", cells, options.results)):
        measured = run(cell, options.seconds)
        if WORLD.rank == 0:
            rows.add("classes", cell, measured, options.results)
            print(cell, measured, flush=True)


if __name__ == "__main__":
    main()
