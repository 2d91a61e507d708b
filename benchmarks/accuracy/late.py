"""``python -m benchmarks.accuracy.late``: gradients one step late, beside those of the step itself.

Dense and `sharded`, anticipating or not, through the real exchange in one process. Rows are kept as they are done, and
what is there is not run again; ``--table`` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.accuracy.methods import ANTICIPATE, Wrap, exchanged
from benchmarks.accuracy.simulate import train
from benchmarks.accuracy.tasks import TASKS
from benchmarks.gpu.record import Record, Row
from hvd_sketch import Compression

RESULTS = Path("benchmarks/results/accuracy-late.json")
METHODS = ("dense", "sharded", "sharded, anticipate")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task: what is trained.
        method: one of `METHODS`.
        late: whether gradients are applied one step late.
        seed: of the start and of the batches.
        ranks: how many.
        steps: how many.
        ratio: asked for.
    """

    task: str
    method: str
    late: bool
    seed: int
    ranks: int
    steps: int
    ratio: float

    def row(self) -> Row:
        """Train, and say how it went; the last gradient is applied nowhere, as where nobody calls ``finish()``."""
        outcome = train(TASKS[self.task], self._wrap(), ranks=self.ranks, seed=self.seed, steps=self.steps)
        losses = [(step, loss) for step, _, loss in outcome.losses]
        return {**vars(self), "final_loss": outcome.final_loss, "diverged": outcome.diverged, "losses": losses}

    def _wrap(self) -> Wrap:
        if self.method == "dense":
            return exchanged(Compression.none, delayed=self.late)
        feedback = ANTICIPATE if self.method.endswith("anticipate") else None
        return exchanged(Compression.sharded(ratio=self.ratio, warmup_steps=0), feedback, delayed=self.late)


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.late", description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="transformer-adamw", help="(default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--late", type=int, nargs="+", choices=(0, 1), default=(0, 1), help="steps (default: 0 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--ranks", type=int, default=8, help="(default: 8)")
    parser.add_argument("--steps", type=int, help="(default: the task's)")
    parser.add_argument("--ratio", type=float, default=40.0, help="(default: 40)")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(RESULTS)
    steps = options.steps or TASKS[options.task].steps
    for seed, method, late in itertools.product(options.seeds, options.methods, options.late):
        run = Run(options.task, method, bool(late), seed, options.ranks, steps, options.ratio)
        if not options.table and not any(vars(run).items() <= row.items() for row in _rows(record)):
            row = run.row()
            record.replace([*_rows(record), row])  # read again: several of these programs may run at a time
    print(table(_rows(record)))


def _rows(record: Record) -> list[Row]:
    return record.rows() if RESULTS.exists() else []


def table(rows: list[Row]) -> str:
    """Losses by seed, in Markdown."""
    lines = ["| task | method | ratio | gradients | losses |", "|---|---|---|---|---|"]
    for kind, group in itertools.groupby(sorted(rows, key=_kind), _kind):
        losses = ", ".join(f"{row['final_loss']:.3f}" for row in sorted(group, key=lambda row: int(row["seed"])))
        task, method, ratio, late = kind
        lines.append(f"| {task} | {method} | {ratio:g} | {'one step late' if late else 'of the step'} | {losses} |")
    return "\n".join(lines)


def _kind(row: Row) -> tuple[str, str, float, bool]:
    return row["task"], row["method"], 1.0 if row["method"] == "dense" else row["ratio"], row["late"]


if __name__ == "__main__":
    main()
