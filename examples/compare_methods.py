"""Compare the methods against misleading errors at equal bytes, on both data sets of the examples.

    mpirun -np 2 --bind-to none python examples/compare_methods.py --quick
    mpirun -np 4 --bind-to none python examples/compare_methods.py --results methods.json --plot methods.png
    mpirun -np 4 --bind-to none python examples/compare_methods.py --compressor stride --methods dense EF SAEF CSER

Every method spends about 4 * parameters / ratio bytes a step, and what it really sent is measured. Dense training and
error feedback at Accordion's two ratios, half and double, are there to compare with. The learning rate warms up, and
falls to a fifth after two thirds of the steps. Every coordinate may be left out, those of biases as well, and no
gradient is clipped. A run that is in the file of results already is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import char_transformer
import compare_picture
import digits_cnn
import torch
import torch.nn.functional as F
from compared_methods import COMPRESSORS, METHODS, Setting
from harness import Record, mean_over_ranks
from harness.record import write
from torch import Tensor, nn
from tqdm import tqdm

import hvd_sketch as hvd

SEED_STRIDE = 100_000  # steps between the batches of two seeds
DECAY_AT, DECAY = 2 / 3, 0.2  # of the steps, of the learning rate
Batch = Callable[[int], tuple[Tensor, Tensor]]


class Task(NamedTuple):
    """A data set, its model and its training; ``inputs`` and ``targets`` are this rank's part of the validation."""

    name: str
    model: Callable[[], nn.Module]
    lr: float
    batch: Batch
    inputs: Tensor
    targets: Tensor


def main(options: argparse.Namespace) -> None:
    setting = Setting(options.ratio, options.steps, options.compressor)
    records: list[Record] = hvd.broadcast_object(recorded(options.results))
    chosen: list[Record] = []
    for seed in range(options.seeds):
        for task in (digits_task(), text_task(options.quick)):
            task = task._replace(lr=task.lr * options.lr_scale)
            for label in options.methods:
                empty = blank(task, label, setting, seed)
                known = [record for record in records if (record.label, record.settings) == (label, empty.settings)]
                if not known:
                    known = [train(task, setting, seed, options.eval_every, empty)]
                    records += known
                    if options.results is not None and hvd.rank() == 0:
                        write(options.results, records)
                chosen += known
    if hvd.rank() == 0:
        compare_picture.show(chosen)
        if options.plot is not None:
            compare_picture.draw(options.plot, chosen)


def recorded(path: Path | None) -> list[Record]:
    """The runs that a file holds already."""
    if path is None or not path.exists():
        return []
    return [Record(**record) for record in json.loads(path.read_text())]


def blank(task: Task, label: str, setting: Setting, seed: int) -> Record:
    """The record of a run before its first step; dense training is the same for every ratio and compressor."""
    settings = {"ranks": hvd.size(), "steps": setting.steps, "seed": seed, "task": task.name, "lr": task.lr}
    if label != "dense":
        settings |= {"ratio": setting.ratio, "compressor": setting.compressor}
    return Record(label, "validation loss", settings)


def train(task: Task, setting: Setting, seed: int, eval_every: int, record: Record) -> Record:
    """One run of one method; equal seeds are equal weights and equal batches for all methods."""
    torch.manual_seed(seed)
    model = task.model()
    sgd = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9)
    optimizer = METHODS[record.label](sgd, model, setting)
    stats = optimizer.stats if hasattr(optimizer, "stats") else optimizer.exchange.stats
    for step in tqdm(range(setting.steps), f"{task.name}, seed {seed}, {record.label}", disable=hvd.rank() != 0):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(task.lr, step, setting.steps)
        inputs, targets = task.batch(seed * SEED_STRIDE + step)
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        optimizer.step()
        if (step + 1) % eval_every == 0 or step + 1 == setting.steps:
            record.steps.append(step + 1)
            record.bytes.append(stats.bytes_sent)
            record.values.append(evaluate(optimizer, model, task))
    record.dense_bytes = stats.dense_bytes
    return record


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Up to the peak in a few steps, and down once."""
    return peak * (DECAY if step >= DECAY_AT * steps else min(1.0, (step + 1) / char_transformer.LR_WARMUP))


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over the last dimension of the scores, in nats."""
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(optimizer: Any, model: nn.Module, task: Task) -> float:
    """The loss of the one model that all ranks share, or would share if they met now."""
    if not hasattr(optimizer, "average_model"):
        digits_cnn.average_batch_norm(model)
    with optimizer.average_model() if hasattr(optimizer, "average_model") else nullcontext():
        model.eval()
        loss = loss_of(model(task.inputs), task.targets)
        model.train()
    return mean_over_ranks(float(loss) * len(task.targets), len(task.targets))


def digits_task() -> Task:
    images, digits = digits_cnn.load()
    validating = torch.arange(len(images)) % 5 == 0
    mine = slice(hvd.rank(), None, hvd.size())
    training = images[~validating][mine], digits[~validating][mine]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = digits_cnn.sample(len(training[0]), 16, 0, step)
        return training[0][chosen], training[1][chosen]

    model = partial(digits_cnn.DigitsCNN, 16)
    return Task("digits", model, 0.05, batch, images[validating][mine], digits[validating][mine])


def text_task(quick: bool) -> Task:
    training_files, validation_files = char_transformer.source_files()
    training = char_transformer.encode(training_files[hvd.rank() :: hvd.size()])
    validation = char_transformer.encode(validation_files)
    starts = torch.linspace(0, len(validation) - char_transformer.CONTEXT - 1, 32 if quick else 128).long()
    inputs, targets = char_transformer.windows(validation, starts[hvd.rank() :: hvd.size()])
    model = partial(char_transformer.CharTransformer, 32 if quick else 64, 1 if quick else 2, 4)
    return Task(
        "text", model, 0.3, lambda step: char_transformer.random_windows(training, 8, 0, step), inputs, targets
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="small models, few steps, one seed")
    add("--ratio", type=float, help="dense bytes over bytes sent (default 40, quick 8)")
    add("--steps", type=int, help="steps of every run (default 300, quick 30)")
    add("--seeds", type=int, help="runs of each method (default 3, quick 1)")
    add("--compressor", choices=COMPRESSORS, default="sharded", help="of every method but the dense one")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="(default all)")
    add("--lr-scale", type=float, default=1.0, help="times the learning rates that suit dense training")
    add("--eval-every", type=int, default=10, metavar="STEPS", help="steps between two evaluations")
    add("--results", type=Path, metavar="FILE.json", help="keep the records of all runs; those in it are not repeated")
    add("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    given = parser.parse_args()
    defaults = {"ratio": 8.0, "steps": 30, "seeds": 1} if given.quick else {"ratio": 40.0, "steps": 300, "seeds": 3}
    for name, value in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


if __name__ == "__main__":
    hvd.init()
    main(options())
