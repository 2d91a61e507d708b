"""One random bit flipped in one received message: who is told, and what came of it where nobody is."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch import Compression, TensorTopK
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.comm.pending import Pending
from hvd_sketch.methods.server import message as server
from hvd_sketch.methods.swarm import message as swarm
from hvd_sketch.methods.swarm.lattice import Lattice
from hvd_sketch.methods.swarm.node import Node

RANKS, ON_HOSTS, STEPS, LAST = 3, 4, 7, 5
"""Ranks, and those of two hosts. Bits are flipped before step `LAST`, so that there is a step left to tell of it."""

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "flips.json"
"""The outcome of every run, in turn; without it, all begins anew."""

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- written by `python -m benchmarks.faults.flips` -->", "<!-- until here -->"
KINDS = ("told", "no effect", "told to some ranks only", "silent", "hang", "crash")

LIMIT = 120.0
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

HOSTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "two ranks a host": lambda: {
        "compression": Compression.sharded(clip_norm=0.2, **PLAIN),
        "error_feedback": None,
        "hierarchical": 2,
    },
}
"""The same, of two hosts."""

METHODS: Mapping[str, Callable[[torch.optim.Optimizer, nn.Module, Communicator], Any]] = {
    "local SGD": lambda inner, model, comm: hvd.LocalSGD(
        inner, model, comm, compression=Compression.sharded(**PLAIN), period=2, outer_momentum=0.3
    ),
    "overlap": lambda inner, model, comm: hvd.OverlapLocalSGD(inner, model, comm, period=2),
    "CSER": lambda inner, model, comm: hvd.CSER(
        *(inner, model, comm), gradients=Compression.stride(**PLAIN), errors=Compression.sharded(**PLAIN), period=2
    ),
    "DmSGD": hvd.DmSGD,
    "DecentLaM": hvd.DecentLaM,
    "LEAD": lambda inner, model, comm: hvd.LEAD(torch.optim.SGD(model.parameters(), 0.1), model, comm),
}
"""Methods with a model of their own on every rank, by name."""


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

    def damage(self, message: Tensor) -> None:
        """Flip it."""
        flat = message.view(-1).view(torch.uint8)
        bit = int(self.where * 8 * flat.numel())
        if flat.numel():
            flat[bit // 8] ^= 1 << bit % 8


class End(NamedTuple):
    """What one rank is left with; and how many messages came until step `LAST`."""

    parameters: Tensor
    residual: Tensor
    messages: int


class Receiver:
    """Counts what a communicator receives, and flips a bit of it."""

    def __init__(self, comm: Communicator, flip: Flip | None) -> None:
        self.count, self._flip = 0, flip if flip is not None and flip.rank == comm.rank else None
        self._listen(comm)

    def _listen(self, comm: Communicator) -> Communicator:
        """To a communicator, and to those that are made of it."""
        for name in ("post_allreduce", "post_allgather", "post_alltoall", "run_broadcast"):
            setattr(comm, name, partial(self._received, getattr(comm, name)))
        subgroup = comm.subgroup
        comm.subgroup = lambda ranks: self._listen(subgroup(ranks))  # type: ignore[method-assign]
        return comm

    def _received(self, post: Callable[..., Pending | None], tensor: Tensor, *arguments: Any) -> Pending:
        pending = post(tensor, *arguments)
        result = tensor if pending is None else pending.wait()
        if self._flip is not None and self._flip.message == self.count:
            self._flip.damage(result)
        self.count += 1
        return Pending(result)


def optimizer_of(way: str, model: nn.Module, comm: Communicator) -> Any:
    """What a way trains with."""
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if way in METHODS:
        return METHODS[way](inner, model, comm)
    return hvd.DistributedOptimizer(inner, model.named_parameters(), comm=comm, **{**WAYS, **HOSTS}[way]())


def train(way: str, flip: Flip | None, comm: Communicator) -> End:
    """One rank's part."""
    received, messages = Receiver(comm, flip), 0
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20), nn.Linear(20, 20))
    for number, parameter in enumerate(model.parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.copy_(drawn / 8)
    optimizer = optimizer_of(way, model, comm)
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
    parameters = [parameter.detach().reshape(-1) for parameter in model.parameters()]
    if way not in METHODS:
        return End(torch.cat(parameters), optimizer.exchange.memory.residual.clone(), messages)
    own = torch.cat(parameters)
    optimizer.finish()
    with optimizer.average_model():
        return End(own, torch.cat(parameters), messages)


def ranks_of(way: str) -> int:
    """How many train."""
    return ON_HOSTS if way in HOSTS else RANKS


def run(way: str, flip: Flip | None) -> list[End | BaseException]:
    """Every rank's end, or its error."""
    ends: list[End | BaseException] = [RuntimeError("never ended")] * ranks_of(way)

    def body(comm: Communicator) -> None:
        try:
            ends[comm.rank] = train(way, flip, comm)
        except BaseException as error:
            ends[comm.rank] = error
            raise

    try:
        InProcessGroup(len(ends), timeout=LIMIT).run(body)
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
    generator = random.Random(f"{way} {seed}")
    if way in LETTERS:
        return Flip(0, generator.randrange(len(LETTERS[way]())), generator.random())
    clean, rank = undisturbed(way), generator.randrange(ranks_of(way))
    return Flip(rank, generator.randrange(clean[rank].messages), generator.random())


def outcome(way: str, flip: Flip) -> str:
    """``told`` or ``no effect``; anything else is a fault of ours."""
    if way in LETTERS:
        return outcome_of_letter(way, flip)
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
        return "told" if len(errors) == len(ends) else "told to some ranks only"
    pairs = [(end, its) for end, its in zip(ends, clean, strict=True) if isinstance(end, End)]
    if not all(torch.equal(end.parameters, its.parameters) for end, its in pairs):
        return "silent: parameters"
    if not all(torch.equal(end.residual, its.residual) for end, its in pairs):
        return "silent: memory"
    return "no effect"


def swarms_letters() -> list[Tensor]:
    """A message of every kind that the nodes of a swarm send, with a model in it where it has one."""
    node = Node(torch.randn(501, generator=torch.Generator().manual_seed(0)), Lattice(8, 2.0**-8), Buffers())
    models = [node.offer(1)[1], node.insist(node.offer(1)[0])]
    return [
        *models,
        *(swarm.Header(kind, 7).write(torch.zeros(swarm.HEADER, dtype=torch.uint8)) for kind in swarm.Kind),
    ]


def servers_letters() -> list[Tensor]:
    """A message of every kind that workers and their server send."""
    content = torch.randn(501, generator=torch.Generator().manual_seed(0)).view(torch.uint8)
    return [server.Header(kind, 7).write(*payload) for kind in server.Kind for payload in ((), (content,))]


LETTERS: Mapping[str, Callable[[], list[Tensor]]] = {
    "a swarm's messages": swarms_letters,
    "a server's messages": servers_letters,
}
"""Messages between two ranks, which one of them reads by itself, by name."""


def outcome_of_letter(way: str, flip: Flip) -> str:
    """``told`` where the reader notices."""
    letter = LETTERS[way]()[flip.message].clone()
    flip.damage(letter)
    try:
        whole = server.Header.read(letter)[2] if way == "a server's messages" else bool(swarm.Header.read(letter))
    except (swarm.Damaged, server.Unreadable):
        whole = False
    return "silent: a message" if whole else "told"


def measure(runs: int, results: Path) -> dict[str, list[str]]:
    """Outcomes by way of so many runs; those that the file has are not repeated."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "hvd_sketch: step 3 is void")
    known: list[str] = json.loads(results.read_text()) if results.exists() else []
    ways = [*WAYS, *HOSTS, *METHODS, *LETTERS]
    for number in range(len(known), runs):
        way = ways[number % len(ways)]
        known.append(outcome(way, draw(way, number)))
        if known[-1] not in ("told", "no effect"):
            print(f"{way} {number}: {known[-1]}: {draw(way, number)}", flush=True)
        results.write_text(json.dumps(known, indent=0) + "\n")
    return {way: known[at : runs : len(ways)] for at, way in enumerate(ways)}


def table(outcomes: Mapping[str, list[str]]) -> str:
    """Counts by way."""
    counts = {way: Counter(result.split(":")[0] for result in its) for way, its in outcomes.items()}
    total = sum(counts.values(), Counter[str]())
    kinds = [*KINDS, *sorted(total.keys() - set(KINDS))]
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    rows = {**counts, f"all {sum(total.values())}": total}
    return "\n".join(
        [*lines, *(f"| {way} | {' | '.join(str(its[kind]) for kind in kinds)} |" for way, its in rows.items())]
    )


def main(runs: int) -> None:
    """Measure, and write the page's table."""
    text = table(measure(runs, RESULTS))
    page = PAGE.read_text()
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    print(text)


if __name__ == "__main__":
    main(int(sys.argv[1]))
