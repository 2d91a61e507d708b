"""One process: every collective is the identity."""

from __future__ import annotations

from torch import Tensor

from hvd_sketch.comm.base import Communicator


class SingleProcess(Communicator):
    """The communicator of a script that no launcher started."""

    rank = 0
    size = 1

    def _allreduce(self, tensor: Tensor, name: str) -> None:
        return

    def _allgather(self, tensor: Tensor, name: str) -> Tensor:
        return tensor.clone().unsqueeze(0)

    def _alltoall(self, tensor: Tensor, name: str) -> Tensor:
        return tensor.clone()

    def _broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        return
