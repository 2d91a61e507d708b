"""Eight workers, of which one is five times slower and the only one that has seen an 8 or a 9, on a clock of its own.

``python -m benchmarks.server.classes --seeds 0 1``

In one process, as `benchmarks.server.straggler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.server import rows
from benchmarks.server.digits import Digits, accuracy, split
from benchmarks.server.rows import Row
from benchmarks.server.straggler import HORIZON, SLOW, WORKERS, Moment, Task, served, task_of
from hvd_sketch.methods.server import FedAsync, Mean, Plain
from hvd_sketch.methods.server.rules.tiers import Tiers

RARE = 8  # classes from 8 on
PERIOD, RATE, FACTOR = 4, 0.2, 5.0
TIERS = [[number for number in range(WORKERS) if number != SLOW], [SLOW]]


def fedat(weights: Any, published: bool = False) -> Callable[[Task], Iterator[Moment]]:
    """Two tiers, the slow worker by itself."""
    made: Callable[[Task], Iterator[Moment]] = served(
        lambda: Tiers(TIERS, weights=weights, published=published), period=PERIOD, proximal=0.1
    )
    return made


METHODS: dict[str, Callable[[Task], Iterator[Moment]]] = {
    "synchronous mean": served(Mean, period=PERIOD),
    "AsyncSGD": served(Plain, period=PERIOD),
    "FedAsync": served(lambda: FedAsync(alpha=0.3), period=PERIOD),
    "FedAT, mirror": fedat("mirror"),
    "FedAT, published": fedat("mirror", published=True),
    "FedAT, uniform": fedat("uniform"),
    "FedAT, samples": fedat("samples"),
}


def shares() -> list[Digits]:
    """The rare classes are the slow worker's."""
    data = split().workers
    rare = data.labels >= RARE
    common = data.at(~rare)
    spread = [common.at(slice(number, None, WORKERS - 1)) for number in range(WORKERS - 1)]
    return [*spread[:SLOW], data.at(rare), *spread[SLOW:]]


def read_of(model: nn.Module) -> Row:
    """What a model reads of the slow worker's classes and of the others."""
    test = split().test
    rare = test.labels >= RARE
    return {"rare": accuracy(model, test.at(rare)), "common": accuracy(model, test.at(~rare))}


def run(cell: Row) -> Row:
    """What the server's model reads when the time is over."""
    task = task_of({"factor": FACTOR, **cell}, RATE / (WORKERS if cell["method"] == "AsyncSGD" else 1), shares())
    shown = task.parameters.new()
    for now, model, _ in METHODS[cell["method"]](task):
        if now <= HORIZON:
            shown.vector.copy_(model)
    task.parameters.write(shown)
    return read_of(task.model)


def main() -> None:
    """Measure what is missing."""
    options = rows.parser(__doc__).parse_args()
    rows.fill("classes", rows.grid(seed=options.seeds, method=METHODS), run, options.results)


if __name__ == "__main__":
    main()
