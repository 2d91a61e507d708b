"""A mean over all nodes that are there, by messages, where a collective would hang on a dead one."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.methods.swarm.message import HEADER, Header, Kind
from hvd_sketch.methods.swarm.peers import Peers, Post


class Assembly:
    """Means by way of the lowest rank that is there, which adds up in float64.

    All nodes call `mean` equally often. Sent: the vector once by every node, and by the lowest
    rank to every other. Nodes that are away are left out, and get the result should they return.
    Should the lowest rank die when it has told only some of the others, these tell the rest: every
    node keeps its last result, and a new lowest rank first asks whether there is one.

    Args:
        condition: notified after every message; its lock guards the state.
    """

    def __init__(self, post: Post, peers: Peers, buffers: Buffers, condition: threading.Condition) -> None:
        self._post, self._peers, self._buffers, self._condition = post, peers, buffers, condition
        self._round = 0
        self._sums: dict[int, Tensor] = {}
        self._counted: dict[int, set[int]] = {}
        self._results: dict[int, Tensor] = {}

    def mean(self, vector: Tensor) -> None:
        """Replace ``vector`` (float32 or float64, host) by its mean over the nodes that are there.

        Raises:
            PeerLost: see `Peers.wait`.
        """
        with self._condition:
            number, told = self._round, -1
            while number not in self._results:
                root = self._root()
                if root == self._peers.rank:
                    self._lead(number, vector)
                else:
                    self._follow(number, vector, root, tell=root != told)
                told = root
            vector.copy_(self._results[number])
            self._round += 1
            self._sums = {later: sums for later, sums in self._sums.items() if later > number}
            self._counted = {later: ranks for later, ranks in self._counted.items() if later > number}
            self._results = {known: result for known, result in self._results.items() if known >= number}

    def receive(self, source: int, header: Header, message: Tensor, dtype: torch.dtype) -> None:
        """Take in a share or a result, or tell one; the lock is held."""
        number, values = header.number, message[HEADER:].view(dtype)
        if header.kind != Kind.MEAN and number in self._results:
            self._send(source, Kind.MEAN, number, self._results[number])
        elif header.kind == Kind.MEAN and number >= self._round:
            self._results.setdefault(number, values.clone())
        elif header.kind == Kind.SHARE and number >= self._round:
            self._add(number, source, values)
            if number > self._round:  # then it has the result of this one, from a rank that died
                self._peers.tell(source, Kind.ASK, self._round)

    def _lead(self, number: int, vector: Tensor) -> None:
        """As the lowest rank: wait for everybody's share, and tell everybody the result."""
        self._add(number, self._peers.rank, vector)
        for rank in self._peers.present(self._missing(number)) if self._peers.rank else ():
            self._peers.tell(rank, Kind.ASK, number)
        self._peers.wait(lambda: self._settled(number), lambda: self._missing(number))
        if number not in self._results and self._root() == self._peers.rank:
            self._publish(number, vector)

    def _follow(self, number: int, vector: Tensor, root: int, *, tell: bool) -> None:
        """Wait for the result from ``root``, unless another rank turns out to be the lowest."""
        if tell:
            self._send(root, Kind.SHARE, number, vector)
        self._peers.wait(lambda: number in self._results or self._root() != root, lambda: (root,))

    def _root(self) -> int:
        return min(self._peers.present(range(self._peers.size)))

    def _missing(self, number: int) -> list[int]:
        return [rank for rank in range(self._peers.size) if rank not in self._counted[number]]

    def _settled(self, number: int) -> bool:
        deposed = self._root() != self._peers.rank
        return deposed or number in self._results or not self._peers.present(self._missing(number))

    def _add(self, number: int, source: int, values: Tensor) -> None:
        counted = self._counted.setdefault(number, set())
        if source in counted:
            return
        counted.add(source)
        if number in self._sums:
            self._sums[number].add_(values)
        else:
            self._sums[number] = values.to(torch.float64, copy=True)

    def _publish(self, number: int, like: Tensor) -> None:
        result = (self._sums[number] / len(self._counted[number])).to(like.dtype)
        for rank in range(self._peers.size):
            if rank != self._peers.rank and rank not in self._peers.gone:
                self._send(rank, Kind.MEAN, number, result)
        self._results[number] = result

    def _send(self, to: int, kind: Kind, number: int, values: Tensor) -> None:
        message = self._buffers.take(HEADER + values.nbytes)
        message[HEADER:].view(values.dtype).copy_(values)
        self._post.send(to, Header(kind, number).write(message))
