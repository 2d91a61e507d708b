"""Bytes that a host's interface sends in a step, flat and hierarchical: ``python -m benchmarks.hosts``.

Two hosts of L ranks, in one process; every message is counted by what of it leaves the host. An allreduce is a ring in
rank order, which leaves a host once; an alltoall goes from everybody to everybody. An allgather is counted both ways,
as a ring, which is Gloo's, and from everybody to everybody, which is Open MPI's. Nothing here measures time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import Communicator, Pending
from hvd_sketch.comm.hosts import find_hosts
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor

SHAPES = {f"layer {number}": (500, 500) for number in range(4)}
RATIO, HOSTS = 40.0, 2
PLAIN: dict[str, Any] = {"ratio": RATIO, "warmup_steps": 0, "clip_norm": None}
COMPRESSORS: Mapping[str, Compressor] = {
    "sketch": Compression.sketch(**PLAIN),
    "sharded": Compression.sharded(**PLAIN),
    "topk": Compression.topk(**PLAIN),
    "powersgd": Compression.powersgd(rank=4, start_step=0),
}


class Left(NamedTuple):
    """Bytes that left a host, with allgathers by a ring and by direct messages."""

    ring: float
    direct: float


class Counted(Communicator):
    """Another communicator, and what of its messages leaves this rank's host.

    Args:
        inner: the other one.
        hosts: of its ranks.
        left: entries are added to it.
    """

    def __init__(self, inner: Communicator, hosts: Sequence[int], left: list[Left]) -> None:
        self._inner, self._hosts, self.left = inner, hosts, left

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        return Counted(self._inner.subgroup(ranks), [self._hosts[rank] for rank in ranks], self.left)

    @property
    def _others(self) -> int:
        """Ranks on other hosts."""
        return sum(host != self._hosts[self.rank] for host in self._hosts)

    @property
    def _is_last(self) -> bool:
        """Whether a ring leaves the host here."""
        return self._hosts[(self.rank + 1) % self.size] != self._hosts[self.rank]

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        ring = 2 * (self.size - 1) / self.size * tensor.nbytes * self._is_last
        self.left.append(Left(ring, ring))
        return self._inner.post_allreduce(tensor, name)

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        self.left.append(Left((self.size - 1) * tensor.nbytes * self._is_last, self._others * tensor.nbytes))
        return self._inner.post_allgather(tensor, name)

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        direct = self._others / self.size * tensor.nbytes
        self.left.append(Left(direct, direct))
        return self._inner.post_alltoall(tensor, name)

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        self._inner.run_broadcast(tensor, root, name)


def of_a_step(compressor: Compressor, local: int, *, hierarchical: bool) -> Left:
    """What the first host's interface sends in the fourth step, when scales are known."""

    def body(inner: Communicator) -> Left:
        comm = Counted(inner, [rank // local for rank in range(inner.size)], [])
        layout = compressor.layout((name, torch.zeros(shape)) for name, shape in SHAPES.items())
        hosts, _ = find_hosts(comm, local if hierarchical else False)
        exchange = compressor.exchange(layout, comm, average=True, device=torch.device("cpu"), hosts=hosts)
        generator = torch.Generator().manual_seed(inner.rank)
        for _ in range(4):
            comm.left.clear()
            exchange.submit_all(torch.randn(layout.total, generator=generator))
            exchange.run()
        return Left(sum(each.ring for each in comm.left), sum(each.direct for each in comm.left))

    told = run_in_process(HOSTS * local, body)[:local]
    return Left(sum(each.ring for each in told), sum(each.direct for each in told))


def main() -> None:
    """Print the table."""
    logging.getLogger("hvd_sketch").setLevel(logging.WARNING)
    print("| | one rank a host | 2 ranks, flat | hierarchical | 4 ranks, flat | hierarchical |")
    print("|---" * 6 + "|")
    for name, compressor in COMPRESSORS.items():
        lefts = [of_a_step(compressor, 1, hierarchical=False)]
        lefts += [of_a_step(compressor, local, hierarchical=by_host) for local in (2, 4) for by_host in (False, True)]
        print(f"| `{name}` | {' | '.join(map(_told, lefts))} |")


def _told(left: Left) -> str:
    """Kilobytes; both where they differ."""
    numbers = dict.fromkeys(f"{count / 1e3:.1f}" for count in left)
    return ", ".join(numbers)


if __name__ == "__main__":
    main()
