"""Sums and gathers in messages from every rank to every other: as many delays for many ranks as for two."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hvd_sketch.comm.delay import NOTABLE
from hvd_sketch.comm.pending import Pending

Post = Callable[[Tensor, str], Pending]

LARGEST = 2**28
"""Bytes; what is longer takes more time for its bytes than for its delays, and here memory for three of it."""

_MESSAGE = 3e-5  # seconds of a processor for one message


def pays(members: int, crossing: float) -> bool:
    """Whether direct messages are faster than what goes around a ring or up and down a tree.

    A ring waits ``2 (W-1)`` times for a delay and a tree ``2 log2 W`` times, direct messages twice; but every rank
    has ``W - 1`` of them to send. Bytes are the same, so the size of what is summed does not matter.

    Args:
        members: how many ranks, W.
        crossing: seconds that small messages from all to all take.
    """
    return members > 1 and crossing >= NOTABLE and members * _MESSAGE <= crossing * math.log2(members)


class Direct:
    """Two collectives as direct messages, over those of a backend; for ranks that begin and await alike.

    A sum, with x_ij part j of rank i's vector, which is cut into W parts::

        owner j   s_j = x_0j + x_1j + … + x_{W-1,j}     alltoall of parts; in this order, in float32 or wider
        all       s_0 … s_{W-1}                         allgather, rounded once to the vector's dtype

    What an owner computed is what all receive, so ranks cannot differ in a bit. The second message of a sum is sent
    when the first of all sums under way is waited for, for all of them at once: ranks must wait in the same order.

    Args:
        size: how many ranks.
        alltoall: begins to send row j of a tensor to rank j.
        allgather: begins to gather; None where the backend does it around a ring, then every rank gets a copy by
            ``alltoall``.
        begin_all: begins what was given before and waits for a device.
    """

    def __init__(self, size: int, alltoall: Post, allgather: Post | None, begin_all: Callable[[], None]) -> None:
        self._size, self._alltoall, self._allgather, self._begin_all = size, alltoall, allgather, begin_all
        self._under_way: list[_Sum] = []

    def post_sum(self, tensor: Tensor, name: str) -> Pending:
        """Begin to replace a contiguous tensor by its sum over the ranks."""
        rows = torch.nn.functional.pad(tensor.view(-1), (0, -tensor.numel() % self._size)).view(self._size, -1)
        begun = _Sum(self, tensor, name, self._alltoall(rows, f"{name}.parts"))
        self._under_way.append(begun)
        return begun

    def post_gather(self, tensor: Tensor, name: str) -> Pending:
        """Begin to stack every rank's vector to shape ``(size, n)``."""
        if self._allgather is not None:
            return self._allgather(tensor, name)
        return self._alltoall(tensor.expand(self._size, -1).contiguous(), name)

    def tell_sums(self) -> None:
        """Send the second message of all sums under way, in the order in which they began."""
        self._begin_all()
        for begun in self._under_way:
            begun.tell()
        self._under_way.clear()


class _Sum(Pending):
    def __init__(self, direct: Direct, tensor: Tensor, name: str, parts: Pending) -> None:
        super().__init__(tensor)
        self._direct, self._name = direct, name
        self._parts, self._told = parts, False
        self._sums: Pending | None = None

    def poll(self) -> None:
        (self._sums or self._parts).poll()

    def tell(self) -> None:
        """Sum what came, and tell everybody."""
        received = self._parts.wait()
        total = received[0] if _is_wide(received.dtype) else received[0].float()
        for part in received[1:]:
            total.add_(part)
        self._sums = self._direct.post_gather(total.to(received.dtype), f"{self._name}.sums")

    def wait(self) -> Tensor:
        if self._told:
            return self._result
        if self._sums is None:
            self._direct.tell_sums()
        assert self._sums is not None
        flat = self._result.view(-1)
        flat.copy_(self._sums.wait().view(-1)[: flat.numel()])
        self._told = True
        return self._result


def _is_wide(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point or dtype.itemsize >= torch.float32.itemsize
