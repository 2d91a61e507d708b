"""``python -m benchmarks.accuracy.hosts``: one memory a rank against one a host, on many simulated ranks.

The transformer, with `sharded` and `Anticipate`, through the real exchange in one process. Dense is one rank with the
batches of all, which computes the same mean. Rows are kept as they are done, and what is there is not run again;
``--table`` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.methods import ANTICIPATE, DENSE, Wrap, exchanged
from benchmarks.accuracy.simulate import train
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.gpu.record import Record, Row
from hvd_sketch import Compression
from hvd_sketch.comm import Communicator

RESULTS = Path("benchmarks/results/accuracy-hosts.json")
TASK = TASKS["transformer-adamw"]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        ranks: how many.
        local: of them on a host, with one memory; 0 for dense.
        batch: samples of a rank in a step.
        seed: of the start and of the batches.
        steps: how many.
        ratio: asked for.
    """

    ranks: int
    local: int
    batch: int
    seed: int
    steps: int
    ratio: float

    def row(self) -> Row:
        """Train, and say how it went."""
        made: list[Any] = []
        if self.local:
            outcome = train(self._task(1), self._wrap(made), ranks=self.ranks, seed=self.seed, steps=self.steps)
        else:
            outcome = train(self._task(self.ranks), DENSE, ranks=1, seed=self.seed, steps=self.steps)
        losses = [(step, loss) for step, _, loss in outcome.losses]
        told = {"final_loss": outcome.final_loss, "diverged": outcome.diverged, "losses": losses}
        return {**vars(self), "sent_ratio": round(made[0].exchange.stats.ratio, 2) if made else 1.0, **told}

    def _task(self, ranks: int) -> Task:
        return replace(TASK, batch_size=ranks * self.batch)

    def _wrap(self, made: list[Any]) -> Wrap:
        """The method; what rank 0's optimizer becomes is put into a list."""
        compression = Compression.sharded(ratio=self.ratio, warmup_steps=0)
        wrapped = exchanged(compression, ANTICIPATE, hierarchical=self.local)

        def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, comm: Communicator) -> Any:
            distributed = wrapped(optimizer, model, comm)
            if comm.rank == 0:
                made.append(distributed)
            return distributed

        return wrap


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.hosts", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="(default: 8)")
    parser.add_argument("--local", type=int, nargs="+", default=[1, 2, 4], help="ranks a host (default: 1 2 4)")
    parser.add_argument("--batch", type=int, default=TASK.batch_size, help="samples a rank (default: the task's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--steps", type=int, default=TASK.steps, help="(default: the task's)")
    parser.add_argument("--ratio", type=float, default=40.0, help="(default: 40)")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(RESULTS)
    rows = record.rows() if RESULTS.exists() else []
    for run in () if options.table else _runs(options):
        if not any(vars(run).items() <= row.items() for row in rows):
            rows.append(run.row())
            record.replace(rows)
    print(table(rows))


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    for ranks, seed, local in itertools.product(options.ranks, options.seeds, (0, *options.local)):
        yield Run(ranks, local, options.batch, seed, options.steps, options.ratio)


def table(rows: list[Row]) -> str:
    """Loss by ranks and hosts, and percent above the dense run of the same seed, in Markdown."""
    lines = ["| ranks | samples a rank | steps | memories | ratio | loss | percent above dense |", "|---" * 7 + "|"]
    for kind, group in itertools.groupby(sorted(rows, key=_kind), _kind):
        found = list(group)
        losses = " ".join(f"{row['final_loss']:.3f}" for row in found)
        gaps = [gap for row in found for gap in _gaps(row, rows)]
        ranks, batch, steps, local, ratio = kind
        memories = f"{ranks // local}" + f", of hosts of {local}" * (local > 1) if local else "dense"
        told = f"{', '.join(f'{gap:.1f}' for gap in gaps)} (mean {statistics.mean(gaps):.1f})" if local else ""
        lines.append(f"| {ranks} | {batch} | {steps} | {memories} | {ratio if local else 1:g} | {losses} | {told} |")
    return "\n".join(lines)


def _kind(row: Row) -> tuple[Any, ...]:
    return row["ranks"], row["batch"], row["steps"], row["local"], row["ratio"]


def _gaps(row: Row, rows: list[Row]) -> Iterator[float]:
    """Percent above dense, where dense was run."""
    alike = {**{name: row[name] for name in ("ranks", "batch", "seed", "steps")}, "local": 0}
    for dense in (each for each in rows if alike.items() <= each.items()):
        yield 100 * (row["final_loss"] / dense["final_loss"] - 1)


if __name__ == "__main__":
    main()
