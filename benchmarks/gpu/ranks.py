"""Many ranks in one, for measurements: all hold the same."""

from __future__ import annotations

from torch import Tensor

from hvd_sketch.comm import Communicator
from hvd_sketch.comm.base import Pending


class Alike(Communicator):
    """One of ``size`` ranks that all send what this one does, so that every collective is some arithmetic here.

    An exchange then does all that it would do on that many ranks, but for the network.
    """

    rank = 0
    size = 8

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor.mul_(self.size))

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor.expand(self.size, -1).clone())

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        return Pending(tensor[self.rank].expand_as(tensor).clone())

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        return
