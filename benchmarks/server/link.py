"""How many updates a second a server takes over a link that limits it, dense and compressed both ways.

``python -m benchmarks.cluster run --hosts 5 --mbit 100 -- python -m benchmarks.server.link --mbit 100``

Host 1 is the server, all others push as fast as they are answered; nothing is computed but the update itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

import hvd_sketch as hvd
from benchmarks.server import rows
from benchmarks.server.rows import Row
from hvd_sketch.methods.server.message import HEADER

WORLD = MPI.COMM_WORLD
RATIO = 40.0
SIZES = (10**5, 10**6, 10**7)
SPARSE: dict[str, Any] = {"ratio": RATIO, "warmup_steps": 0, "clip_norm": None, "dense_below": 0}
CODES: dict[str, tuple[Any, Any]] = {
    "dense": (hvd.Compression.none, hvd.Compression.none),
    "top-k": (hvd.Compression.topk(**SPARSE), hvd.Compression.topk(**SPARSE)),
    "four bits": (hvd.Compression.sharded(**SPARSE), hvd.Compression.sharded(**SPARSE)),
    "combs": (hvd.Compression.stride(**SPARSE), hvd.Compression.stride(**SPARSE)),
}


class Vector(nn.Module):
    """A model of so many parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(count))


def clock(seconds: float) -> Iterator[None]:
    """Until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def run(cell: Row, seconds: float) -> Row:
    """Push for a while; the server's rank counts."""
    model, (up, down) = Vector(cell["parameters"]), CODES[cell["code"]]
    generator = torch.Generator().manual_seed(1000 * cell["seed"] + WORLD.rank)
    gradient = torch.randn(cell["parameters"], generator=generator).pow_(3)
    changes: list[float] = []
    optimizer = hvd.AsyncSGD(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        model,
        WORLD,
        up=up,
        down=down,
        patience=120.0,
        on_change=lambda version: changes.append(time.monotonic()),
    )
    with optimizer:
        processor = time.process_time()
        for _ in optimizer.work(clock(seconds)):
            model.x.grad = gradient
            optimizer.step()
        processor = time.process_time() - processor
    stats, first = optimizer.stats, WORLD.size - 1  # the first answers were whole models
    if WORLD.rank:
        return {}
    pushes = len(changes)
    payload = 4 * cell["parameters"]
    return {
        "updates_per_second": (pushes - 1 - first) / (changes[-1] - changes[first]),
        "bytes_up": stats.bytes_received / pushes,
        "bytes_down": (stats.bytes_sent - first * (payload + HEADER)) / pushes,
        "dense_limit": cell["mbit"] * 1e6 / 8 / (payload + HEADER),
        "processor_per_update": processor / pushes,
    }


def main() -> None:
    """Measure what is missing."""
    parser = rows.parser(__doc__)
    parser.add_argument("--mbit", type=float, required=True, help="of the links, for the record")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of parameters")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()

    def measure(cell: Row) -> Row:
        transfer = 4 * cell["parameters"] / (options.mbit * 1e6 / 8)  # of a dense update
        return run(cell, options.seconds + (10 * transfer if cell["code"] == "dense" else 0))

    links = {"mbit": [options.mbit], "workers": [WORLD.size - 1]}
    cells = rows.grid(seed=options.seeds, **links, parameters=options.sizes, code=CODES)
    rows.fill("link", cells, measure, options.results, WORLD)


if __name__ == "__main__":
    main()
