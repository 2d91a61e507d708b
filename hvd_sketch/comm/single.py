"""One process: every collective is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending


class SingleProcess(Communicator):
    """The communicator of a script that no launcher started."""

    rank = 0
    size = 1

    def __reduce__(self) -> Any:
        return SingleProcess, ()

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        return SingleProcess()

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor)

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor.clone().unsqueeze(0))

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor.clone())

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        return
