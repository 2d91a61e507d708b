"""Hostile workers, and different data at different speeds, on real ranks: messages, processes and time.

``mpirun -np 11 --map-by slot:OVERSUBSCRIBE --bind-to none python -m benchmarks.server.on_ranks --seeds 0 1``

What `benchmarks.server.attacks` and `benchmarks.server.classes` do on a clock of their own. Steps are mostly asleep.
Hostile workers that know everything read the honest ones' last updates out of memory that all ranks share.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import hvd_sketch as hvd
from benchmarks.server import attacks, classes, rows, straggler
from benchmarks.server.digits import Digits, accuracy, loss_of, network, split
from benchmarks.server.link import clock
from benchmarks.server.rows import Row
from hvd_sketch.methods.server import FedAsync, Mean, Plain

WORLD = MPI.COMM_WORLD
STEP = 0.005  # seconds of a step under attack, up to a fifth more or less
UNIT = 0.02  # seconds of a fast worker's step on data of different classes


def attack(cell: Row) -> Row:
    """One cell of the attack table, by all eleven ranks."""
    data, model = split(), network(cell["seed"])
    number, hostile = WORLD.rank - 1, cell["hostile"]
    bad, count = number >= attacks.WORKERS - hostile, sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        honest = attacks.Honest(shared(WORLD.bcast(f"{folder}/honest"), count))
        doing = attacks.attack_of(cell["attack"], honest, hostile, number) if bad else honest.of(number)
        sgd = torch.optim.SGD(model.parameters(), lr=attacks.RATES.get(cell["rule"], attacks.SYNCHRONOUS_RATE))
        rule = attacks.RULES[cell["rule"]](lambda network, number: loss_of(network, data.trusted))
        optimizer = hvd.AsyncSGD(
            sgd, model, WORLD, rule=rule, period=attacks.PERIOD, outgoing=[doing] if number >= 0 else []
        )
        share = attacks.share_of(max(number, 0), flipped=bad and cell["attack"] == "label flip")
        pace, generator = random.Random(f"{cell['seed']} {number}"), generator_of(cell)
        with optimizer:
            for _ in optimizer.work(range(attacks.PUSHES * attacks.PERIOD)):
                step(optimizer, model, share.batch(generator, attacks.BATCH), pace.uniform(0.8, 1.2) * STEP)
        WORLD.barrier()
    if WORLD.rank:
        return {}
    with optimizer.server_model() as served:
        return {"accuracy": accuracy(served, data.test), **attacks.verdicts(optimizer.stats, hostile)}


def shared(file: str, count: int) -> Tensor:
    """A row of floats for every worker, in memory that all ranks see."""
    if WORLD.rank == 0:
        Path(file).write_bytes(bytes(4 * attacks.WORKERS * count))
    WORLD.barrier()
    return torch.from_file(file, shared=True, size=attacks.WORKERS * count).view(attacks.WORKERS, count)


def generator_of(cell: Row) -> torch.Generator:
    """Of this rank's batches."""
    return torch.Generator().manual_seed(1000 * cell["seed"] + WORLD.rank)


def step(optimizer: Any, model: nn.Module, batch: Digits, seconds: float) -> None:
    """One local step that takes so long at least."""
    time.sleep(seconds)
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def fedat(**settings: Any) -> Callable[..., Any]:
    """Two tiers, the slow worker by itself."""
    tiers = [[number + 1 for number in tier] for tier in classes.TIERS]
    uncompressed = hvd.Compression.none
    return lambda *given: hvd.FedAT(
        *given, tiers=tiers, period=classes.PERIOD, proximal=0.1, code=uncompressed, **settings
    )


def by(rule: Callable[[], Any]) -> Callable[..., Any]:
    """`AsyncSGD` with a rule."""
    return lambda *given: hvd.AsyncSGD(*given, rule=rule(), period=classes.PERIOD)


METHODS: dict[str, Callable[..., Any]] = {
    "synchronous mean": by(Mean),
    "AsyncSGD": by(Plain),
    "FedAsync": by(lambda: FedAsync(alpha=0.3)),
    "FedAT, mirror": fedat(weights="mirror"),
    "FedAT, published": fedat(weights="mirror", published=True),
    "FedAT, uniform": fedat(weights="uniform"),
    "FedAT, samples": fedat(weights="samples"),
}
"""Those of `classes.METHODS`."""


def rare_classes(cell: Row) -> Row:
    """What is read of the slow worker's classes and of the others, by the first nine ranks."""
    trains = WORLD.rank <= straggler.WORKERS
    comm = WORLD.Split(trains)
    row = _train(comm, cell) if trains else {}
    done = WORLD.Ibarrier()
    while not done.Test():
        time.sleep(0.05)
    return row


def _train(comm: Any, cell: Row) -> Row:
    model, number = network(cell["seed"]), comm.rank - 1
    rate = classes.RATE / (comm.size - 1 if cell["method"] == "AsyncSGD" else 1)
    optimizer = METHODS[cell["method"]](torch.optim.SGD(model.parameters(), lr=rate), model, comm)
    share, generator = classes.shares()[max(number, 0)], generator_of(cell)
    seconds = UNIT * (classes.FACTOR if number == straggler.SLOW else 1.0)
    with optimizer:
        for _ in optimizer.work(clock(UNIT * straggler.HORIZON)):
            step(optimizer, model, share.batch(generator, straggler.BATCH), seconds)
    if comm.rank:
        return {}
    with optimizer.server_model() as served:
        return classes.read_of(served)


def main() -> None:
    """Measure what is missing."""
    options = rows.parser(__doc__).parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1)
    rows.fill("attack on ranks", attacks.cells(options.seeds), attack, options.results, WORLD)
    cells = rows.grid(seed=options.seeds, method=METHODS)
    rows.fill("classes on ranks", cells, rare_classes, options.results, WORLD)


if __name__ == "__main__":
    main()
