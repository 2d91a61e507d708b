"""Compare the methods against misleading errors at equal bytes, on both data sets of the examples.

    mpirun -np 2 --bind-to none python examples/compare_methods.py --quick
    mpirun -np 4 --bind-to none python examples/compare_methods.py --results methods.json --plot methods.png
    mpirun -np 4 --bind-to none python examples/compare_methods.py --compressor stride --ratio 200 --methods EF CSER

Every method spends about 4 * parameters / ratio bytes a step, and what it really sent is measured. Dense training and
error feedback at Accordion's two ratios, half and double, are there to compare with. The learning rate warms up, and
falls to a fifth after two thirds of the steps. Every coordinate may be left out, those of biases as well, and no
gradient is clipped. A run that is in the file of results already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import char_transformer
import digits_cnn
import torch
import torch.nn.functional as F
from harness import Record, mean_over_ranks
from harness.record import write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import hvd_sketch as hvd
from hvd_sketch.compression import Sharded, Stride
from hvd_sketch.compressor import Sparsifier
from hvd_sketch.methods.accordion import Accordion
from hvd_sketch.methods.cser import CSER
from hvd_sketch.methods.local_sgd import LocalSGD
from hvd_sketch.methods.step_ahead import StepAhead

SEED_STRIDE = 100_000  # steps between the batches of two seeds
DECAY_AT, DECAY = 2 / 3, 0.2  # of the steps, of the learning rate
COLOURS = ("#4d4d4d", "#edae49", "#b8860b", "#8c6d31", "#d1495b", "#8f2d56", "#00798c", "#30638e", "#6a994e")
Batch = Callable[[int], tuple[Tensor, Tensor]]


class Task(NamedTuple):
    """A data set, its model and its training; ``inputs`` and ``targets`` are this rank's part of the validation."""

    name: str
    model: Callable[[], nn.Module]
    lr: float
    batch: Batch
    inputs: Tensor
    targets: Tensor


class _Everything:
    """Leaves nothing whole."""

    def is_dense(self, name: str, parameter: Tensor) -> bool:
        return False


class _Sharded(_Everything, Sharded):
    pass


class _Stride(_Everything, Stride):
    pass


COMPRESSORS: dict[str, type[Sparsifier]] = {"sharded": _Sharded, "stride": _Stride}


class Setting(NamedTuple):
    """What a method needs to know: bytes are 1 / ratio of dense ones."""

    ratio: float
    steps: int
    compressor: str

    def compress(self, ratio: float, **settings: Any) -> Any:
        return COMPRESSORS[self.compressor](ratio=ratio, warmup_steps=0, clip_norm=None, **settings)


def feedback(optimizer: torch.optim.Optimizer, model: nn.Module, compressor: Any, settings: StepAhead) -> Any:
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compressor, error_feedback=settings)


def dense(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Local SGD that meets after every step: with a linear optimizer, plain data-parallel SGD."""
    return LocalSGD(optimizer, model, period=1)


def ef(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(setting.ratio), StepAhead(0.0, 0))


def ef_twice(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(setting.ratio / 2), StepAhead(0.0, 0))


def ef_half(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(2 * setting.ratio), StepAhead(0.0, 0))


def saef(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return feedback(optimizer, model, setting.compress(setting.ratio), StepAhead(1.0, 0))


def saef_averaging(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Half of the bytes for steps, half for the averaging of errors."""
    return feedback(optimizer, model, setting.compress(2 * setting.ratio), StepAhead(1.0, int(2 * setting.ratio)))


def accordion(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Twice the bytes in critical regimes, half of them otherwise; twelve detections in a run."""
    low, high, epoch = setting.ratio / 2, 2 * setting.ratio, max(1, setting.steps // 12)
    schedule = Accordion(low, high, epoch, every=1, learning_rate=lambda: optimizer.param_groups[0]["lr"])
    return feedback(optimizer, model, setting.compress(setting.ratio, schedule=schedule), StepAhead(0.0, 0))


def cser(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    """Half of the bytes for steps, half for the reset of errors every 8 steps."""
    seed = {"seed": 1} if setting.compressor == "stride" else {}
    errors = setting.compress(setting.ratio / 4, **seed)
    return CSER(optimizer, model, gradients=setting.compress(2 * setting.ratio), errors=errors, period=8)


def local_sgd(optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting) -> Any:
    return LocalSGD(optimizer, model, compression=setting.compress(setting.ratio / 4), period=4)


METHODS = {
    "dense": dense,
    "EF": ef,
    "EF, twice the bytes": ef_twice,
    "EF, half the bytes": ef_half,
    "SAEF": saef,
    "SAEF + averaging": saef_averaging,
    "Accordion": accordion,
    "CSER": cser,
    "local SGD": local_sgd,
}


def main(options: argparse.Namespace) -> None:
    setting = Setting(options.ratio, options.steps, options.compressor)
    records: list[Record] = hvd.broadcast_object(recorded(options.results))
    chosen: list[Record] = []
    for seed in range(options.seeds):
        for task in (digits_task(options.quick), text_task(options.quick)):
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
        show(chosen)
        if options.plot is not None:
            plot(options.plot, chosen)


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
        with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
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


def digits_task(quick: bool) -> Task:
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


def show(records: Sequence[Record]) -> None:
    """Print the last loss of every method: the mean over the seeds and, in brackets, the least and the largest."""
    table = Table("task", "method", "steps", "validation loss", "MB sent per rank", "dense over sent")
    for task, label, runs in _grouped(records):
        last = [run.values[-1] for run in runs]
        spread = f"{statistics.mean(last):.4f} ({min(last):.4f} … {max(last):.4f})"
        sent = statistics.mean(run.bytes[-1] for run in runs) / 1e6
        table.add_row(task, label, f"{runs[0].steps[-1]}", spread, f"{sent:.2f}", f"{runs[0].ratio:.1f}")
    Console(width=119).print(table)


def plot(path: Path, records: Sequence[Record]) -> None:
    """Draw the loss over steps and over bytes; the line is the mean over the seeds, the band all of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _, _ in _grouped(records)))
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(10, 4 * len(tasks)), layout="constrained", squeeze=False)
    for task, label, runs in _grouped(records):
        over_steps, over_bytes = axes[tasks.index(task)]
        values = [run.values for run in runs]
        middle = [statistics.mean(at_step) for at_step in zip(*values, strict=True)]
        low, high = ([pick(at_step) for at_step in zip(*values, strict=True)] for pick in (min, max))
        sent = [count / 1e6 for count in runs[0].bytes]
        colour = COLOURS[list(METHODS).index(label)]
        for ax, along in ((over_steps, runs[0].steps), (over_bytes, sent)):
            ax.plot(along, middle, color=colour, linewidth=1.5, label=label)
            ax.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
        over_steps.set(xlabel="steps", ylabel=f"{task}: validation loss", yscale="log")
        over_bytes.set(xlabel="MB sent per rank", xscale="log", yscale="log")
    axes[0][1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _grouped(records: Sequence[Record]) -> list[tuple[str, str, list[Record]]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.settings["task"], record.label), []).append(record)
    return [(task, label, runs) for (task, label), runs in groups.items()]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="small models, few steps, one seed")
    add("--ratio", type=float, help="dense bytes over bytes sent (default 40, quick 8)")
    add("--steps", type=int, help="steps of every run (default 300, quick 30)")
    add("--seeds", type=int, help="runs of each method (default 3, quick 1)")
    add("--compressor", choices=COMPRESSORS, default="sharded", help="of every method but the dense one")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="(default all)")
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
