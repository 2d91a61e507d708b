"""One random bit flipped in one received message: who is told, and what came of it where nobody is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch import Compression, TensorTopK
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.comm.pending import Pending

RANKS, STEPS, LAST = 3, 7, 5
"""Bits are flipped before step `LAST`, so that there is a step left to tell of it."""

LIMIT = 10.0
"""Seconds; a run that takes so long hangs."""

PLAIN: dict[str, Any] = {"ratio": 6.0, "warmup_steps": 0, "dense_below": 100}
WAYS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "none": lambda: {"compression": Compression.none},
    "fp16": lambda: {"compression": Compression.fp16},
    "sketch": lambda: {"compression": Compression.sketch(**PLAIN)},
    "sketch, float32": lambda: {"compression": Compression.sketch(half=False, oversampling=2.0, **PLAIN)},
    "sketch, buckets": lambda: {"compression": Compression.sketch(buckets=3, **PLAIN)},
    "sketch, in turn": lambda: {"compression": Compression.sketch(in_turn=0.75, oversampling=2.0, **PLAIN)},
    "topk": lambda: {"compression": Compression.topk(**PLAIN)},
    "topk, by tensor": lambda: {"compression": TensorTopK(**PLAIN)},
    "sharded": lambda: {"compression": Compression.sharded(**PLAIN)},
    "sharded, buckets": lambda: {"compression": Compression.sharded(ratio=3.0, warmup_steps=0, buckets=3)},
    "sharded, warm-up": lambda: {"compression": Compression.sharded(ratio=6.0, warmup_steps=6)},
    "sharded, guarded": lambda: {"compression": Compression.sharded(schedule=hvd.Guard(6.0, every=2))},
    "sign": lambda: {"compression": Compression.sign()},
    "stride": lambda: {"compression": Compression.stride(**PLAIN)},
    "powersgd": lambda: {"compression": Compression.powersgd(rank=1, start_step=1)},
    "anticipate": lambda: {"compression": Compression.sharded(**PLAIN), "error_feedback": hvd.Anticipate()},
    "step ahead": lambda: {
        "compression": Compression.topk(**PLAIN),
        "error_feedback": hvd.StepAhead(averaging_period=2),
    },
}
"""Arguments of `hvd_sketch.DistributedOptimizer`, by name."""


class Flip(NamedTuple):
    """Which bit of what one rank receives.

    Attributes:
        rank: whose.
        message: its number among those that the rank receives.
        where: of the bit, as a share of the message's bits.
    """

    rank: int
    message: int
    where: float


class End(NamedTuple):
    """What one rank is left with; and how many messages came until step `LAST`."""

    parameters: Tensor
    residual: Tensor
    messages: int


class Receiver:
    """Counts what a communicator receives, and flips a bit of it."""

    def __init__(self, comm: Communicator, flip: Flip | None) -> None:
        self.count, self._flip = 0, flip if flip is not None and flip.rank == comm.rank else None
        for name in ("post_allreduce", "post_allgather", "post_alltoall"):
            setattr(comm, name, partial(self._received, getattr(comm, name)))

    def _received(self, post: Callable[..., Pending], tensor: Tensor, name: str) -> Pending:
        result = post(tensor, name).wait()
        if self._flip is not None and self._flip.message == self.count:
            flat = result.view(-1).view(torch.uint8)
            bit = int(self._flip.where * 8 * flat.numel())
            flat[bit // 8] ^= 1 << bit % 8
        self.count += 1
        return Pending(result)


def train(way: str, flip: Flip | None, comm: Communicator) -> End:
    """One rank's part."""
    received, messages = Receiver(comm, flip), 0
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20), nn.Linear(20, 20))
    for number, parameter in enumerate(model.parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.copy_(drawn / 8)
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer: Any = hvd.DistributedOptimizer(inner, model.named_parameters(), comm=comm, **WAYS[way]())
    for step in range(STEPS):
        messages = received.count if step == LAST else messages
        optimizer.zero_grad()
        inputs = torch.randn(8, 30, generator=torch.Generator().manual_seed(100 * step + comm.rank))
        if step == 3 and comm.rank == 1:
            inputs[0, 0] = torch.nan
        part = model[:3] if step == 2 and comm.rank else model  # then the last layer has no gradient on some ranks
        with optimizer.step_ahead() if hasattr(optimizer, "step_ahead") else nullcontext():
            part(inputs).square().mean().backward()
        optimizer.step()
    parameters = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return End(parameters, optimizer.exchange.memory.residual.clone(), messages)


def run(way: str, flip: Flip | None) -> list[End | BaseException]:
    """Every rank's end, or its error."""
    ends: list[End | BaseException] = [RuntimeError("never ended")] * RANKS

    def body(comm: Communicator) -> None:
        try:
            ends[comm.rank] = train(way, flip, comm)
        except BaseException as error:
            ends[comm.rank] = error
            raise

    try:
        InProcessGroup(RANKS, timeout=LIMIT).run(body)
    except Exception:
        return ends
    return ends


@cache
def undisturbed(way: str) -> list[End]:
    """Without a flip."""
    ends = run(way, None)
    failed = [end for end in ends if isinstance(end, BaseException)]
    if failed:
        raise failed[0]
    return [end for end in ends if isinstance(end, End)]


def draw(way: str, seed: int) -> Flip:
    """A random bit of a random message that comes early enough to be told of."""
    generator, clean = random.Random(f"{way} {seed}"), undisturbed(way)
    rank = generator.randrange(RANKS)
    return Flip(rank, generator.randrange(clean[rank].messages), generator.random())


def outcome(way: str, flip: Flip) -> str:
    """``told`` or ``no effect``; anything else is a fault of ours."""
    ends, clean = run(way, flip), undisturbed(way)
    errors = [end for end in ends if isinstance(end, BaseException)]
    known = (hvd.RankMismatchError, hvd.ConfigurationError, hvd.RankLostError)
    unknown = [error for error in errors if not isinstance(error, known)]
    if unknown:
        return f"crash: {type(unknown[0]).__name__}: {unknown[0]}"
    late = [error for error in errors if f"waited {LIMIT:g} s" in str(error)]
    if late:
        return f"hang: {late[0]}"
    if errors:
        return "told" if len(errors) == RANKS else "told to some ranks only"
    pairs = [(end, its) for end, its in zip(ends, clean, strict=True) if isinstance(end, End)]
    if not all(torch.equal(end.parameters, its.parameters) for end, its in pairs):
        return "silent: parameters"
    if not all(torch.equal(end.residual, its.residual) for end, its in pairs):
        return "silent: memory"
    return "no effect"


def table(runs: int) -> str:
    """Outcomes of so many runs, by way."""
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {way: Counter() for way in WAYS}
    for number in range(runs):
        way = list(WAYS)[number % len(WAYS)]
        result = outcome(way, draw(way, number))
        counts[way][result.split(":")[0]] += 1
        if result not in ("told", "no effect"):
            print(f"{way} {number}: {result}: {draw(way, number)}", flush=True)
    kinds = ["told", "no effect", *sorted({kind for its in counts.values() for kind in its} - {"told", "no effect"})]
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {way} | {' | '.join(str(its[kind]) for kind in kinds)} |" for way, its in counts.items()]
    total = sum(counts.values(), Counter[str]())
    return "\n".join([*lines, f"| all {runs} | {' | '.join(str(total[kind]) for kind in kinds)} |"])


if __name__ == "__main__":
    import sys

    print(table(int(sys.argv[1])))
