"""``python -m benchmarks.selection``: who should choose what is sent? Ways to choose, at equal bytes, on many ranks.

The transformer of `benchmarks.accuracy`, with the gradients of all ranks as rows of one matrix and the exchange as
arithmetic on it, so that 128 ranks fit one process. Everything is compressed, values are exact but for ``sharded``,
which rounds as it really does. Rows are appended as they finish; what is there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from benchmarks.accuracy.simulate import begin, learning_rate
from benchmarks.accuracy.tasks import TASKS, Task
from hvd_sketch.compressors import Sharded, Sketch
from hvd_sketch.error_feedback.anticipate import respond
from hvd_sketch.layout import Layout, small_or_named
from hvd_sketch.sketch import CountSketch
from hvd_sketch.sparse.comb import comb
from hvd_sketch.sparse.heaviest import heaviest

RESULTS = Path("benchmarks/results/selection.json")
TASK = TASKS["transformer-adamw"]
TOTAL_BATCH = 32
CLIP = 1.0
COEFFICIENT = 0.6
"""That of `hvd_sketch.Anticipate` when the rows were measured."""

Choose = Callable[[Tensor, int], Tensor]
"""Takes what is chosen in a step out of the memories, of shape (ranks, d), and returns its sum over the ranks."""


def oracle(layout: Layout, ratio: float, ranks: int) -> Choose:
    """The largest of the true sum, in float16; nobody pays for knowing them."""
    count = int(4 * layout.total / ratio / 2)

    def choose(memory: Tensor, step: int) -> Tensor:
        return _take(memory, heaviest(memory.sum(dim=0), count))

    return choose


def sketched(layout: Layout, ratio: float, ranks: int, table_share: float = 0.75, in_turn: float = 0.0) -> Choose:
    """The largest of a Count Sketch of the sum, and a share of the values in turn."""
    plan = Sketch(table_share=table_share, in_turn=in_turn).fit(layout, ratio, ranks)
    table = CountSketch(layout.total, plan.rows, plan.cols)

    def choose(memory: Tensor, step: int) -> Tensor:
        table.reset(step)
        table.add(memory.sum(dim=0))
        turn = torch.arange(layout.total)[comb(layout.total, plan.stride, step, 0)]
        return _take(memory, torch.cat([table.top_k(plan.candidates)[0], turn]).unique())

    return choose


def proposed(layout: Layout, ratio: float, ranks: int) -> Choose:
    """Every rank's own largest, gathered; then the exact sums of all of them."""
    count = _proposals(layout, 4 * layout.total / ratio, ranks)

    def choose(memory: Tensor, step: int) -> Tensor:
        return _take_proposed(memory, memory, count)

    return choose


def guided(layout: Layout, ratio: float, ranks: int) -> Choose:
    """As ``proposed``, but by what a rank must expect of the sum, from its own value and a sketch of the sum.

    With own value v, share c of the memory that is common (so that ``W c v`` is the best guess of the sum s from v
    alone, of variance ``t = |s|^2/d - (W c)^2 |v|^2/d``) and the sketch's estimate e of variance ``n = |s|^2/cols``::

        E[s | v, e] = (n W c v + t e) / (n + t)

    An eighth of the bytes is in the table.
    """
    message = 4 * layout.total / ratio
    table = CountSketch(layout.total, 3, max(1, int(message / 8 / 2 / 3)))
    count = _proposals(layout, message * 7 / 8, ranks)

    def choose(memory: Tensor, step: int) -> Tensor:
        table.reset(step)
        table.add(memory.sum(dim=0))
        estimates, sum_energy = table.estimate(), float(table.l2_norm()) ** 2
        own_energy = float(memory.square().sum()) / ranks
        guess = sum_energy / (ranks * own_energy)  # W c
        unknown = max(0.0, sum_energy - guess**2 * own_energy) / layout.total
        noise = sum_energy / table.geometry.cols
        expected = (memory * (noise * guess) + estimates * unknown) / (noise + unknown)
        return _take_proposed(memory, expected, count)

    return choose


def sharded(layout: Layout, ratio: float, ranks: int) -> Choose:
    """`hvd_sketch.compressors.sharded.ShardedExchange`, with its server's errors."""
    [(_, codec)] = Sharded().fit(layout, ratio, ranks)
    count = codec.count

    def choose(memory: Tensor, step: int) -> Tensor:
        update = torch.zeros(layout.total)
        for owner in range(ranks):
            shard = memory[:, owner::ranks]
            total = shard[owner].clone()
            rows = shard.abs().topk(count, dim=1).indices.sort(dim=1).values
            decoded = codec.encode(rows, shard.gather(1, rows))[1]
            decoded[owner] = 0.0  # the owner's own are in the total
            total.index_add_(0, rows.flatten(), decoded.flatten())
            shard.scatter_add_(1, rows, -decoded)
            chosen = heaviest(total, count)
            values = codec.encode(chosen.unsqueeze(0), total[chosen].unsqueeze(0))[1][0]
            update[owner::ranks][chosen] = values
            shard[owner] = total.index_add_(0, chosen, -values)
        return update

    return choose


METHODS: dict[str, Callable[[Layout, float, int], Choose]] = {
    "oracle": oracle,
    "sketched": sketched,
    "sketched, half": partial(sketched, table_share=0.5),
    "sketched, fifth": partial(sketched, table_share=0.2),
    "in turn": partial(sketched, table_share=0.2, in_turn=0.75),
    "proposed": proposed,
    "guided": guided,
    "sharded": sharded,
}


def _proposals(layout: Layout, message: float, ranks: int) -> int:
    """How many each rank may propose: an index is gathered (half of its bytes count), a float16 is summed."""
    fitting = [
        count
        for count in range(1, layout.total // ranks)
        if ranks * count * (2 + (2 + math.log2(layout.total / count)) / 16) <= message
    ]
    return max(fitting, default=1)


def _take_proposed(memory: Tensor, by: Tensor, count: int) -> Tensor:
    return _take(memory, torch.cat([heaviest(own, count) for own in by]).unique())


def _take(memory: Tensor, chosen: Tensor) -> Tensor:
    update = torch.zeros(memory.shape[1])
    update[chosen] = memory[:, chosen].sum(dim=0)
    memory[:, chosen] = 0.0
    return update


def train(method: str, ratio: float, anticipate: bool, ranks: int, seed: int, steps: int) -> float:
    """The validation loss after training with AdamW."""
    layout = Layout.of(TASK.model().named_parameters(), small_or_named(0))
    choose = None if method == "dense" else METHODS[method](layout, ratio, ranks)
    task = dataclasses.replace(TASK, batch_size=max(1, TOTAL_BATCH // ranks))
    model, batches = begin(task, ranks, seed, steps)
    x = nn.Parameter(parameters_to_vector(model.parameters()).detach())
    optimizer = task.optimizer(nn.ParameterList([x]))
    schedule = learning_rate(optimizer, steps)
    memory = torch.zeros(ranks, x.numel())
    for step, (inputs, targets) in enumerate(batches):
        errors = _common(memory, owners=method == "sharded") if anticipate else torch.zeros_like(memory)
        for rank in range(ranks):
            point, ahead = x.detach(), errors[rank].clone()
            if step and choose is not None:
                respond(optimizer, optimizer.param_groups[0], [x], [ahead])
                point = point - ahead
            gradient = _gradient(model, point, inputs.chunk(ranks)[rank], targets.chunk(ranks)[rank])
            memory[rank] += gradient if choose is None else gradient * min(1.0, CLIP / float(gradient.norm()))
        x.grad = (memory.sum(dim=0) if choose is None else choose(memory, step)) / ranks
        if choose is None:
            memory.zero_()
        optimizer.step()
        schedule.step()
    return _validate(model, x.detach(), task)


def _common(memory: Tensor, *, owners: bool) -> Tensor:
    """Every rank's errors, times the share that all have in common and `COEFFICIENT`."""
    ranks, errors = len(memory), memory.clone()
    for rank in range(ranks if owners else 0):
        errors[rank, rank::ranks] /= ranks
    share = memory.mean(dim=0).square().sum() / (errors.square().sum() / ranks)
    return errors * (COEFFICIENT * share.nan_to_num(0.0))


def _gradient(model: nn.Module, point: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    vector_to_parameters(point, model.parameters())
    parts = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def _validate(model: nn.Module, x: Tensor, task: Task) -> float:
    vector_to_parameters(x, model.parameters())
    inputs, targets = task.held_out()
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs), targets))


def main() -> None:
    """Train what is still missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--ratios", type=float, nargs="+", default=[40.0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--anticipate", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"the rows' file (default: {RESULTS})")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted: list[tuple[str, float, bool]] = [("dense", 1.0, False)]
    wanted += itertools.product(options.methods, options.ratios, map(bool, options.anticipate))
    runs = itertools.product(options.ranks, range(options.seeds), wanted)
    for ranks, seed, (method, ratio, anticipate) in tqdm(list(runs), unit="run"):
        rows = json.loads(options.results.read_text()) if options.results.exists() else []
        key = {"method": method, "ratio": ratio, "anticipate": anticipate, "ranks": ranks, "seed": seed}
        key["steps"] = options.steps
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append({**key, "loss": train(method, ratio, anticipate, ranks, seed, options.steps)})
        options.results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
