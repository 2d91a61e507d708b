"""One message to every neighbour and one from each: the exchange of synchronous gossip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.patience import ranks
from hvd_sketch.errors import RankMismatchError
from hvd_sketch.methods.graphs import Graph


class Neighbourhood:
    """Blocking exchange along the edges of a graph, on any `Communicator`.

    Over MPI it is a neighbourhood collective, so a rank talks to its neighbours only. The other
    backends have none; there, in simulations, everything is gathered and the rows are picked.

    Args:
        comm: the ranks.
        mpi_comm: the mpi4py communicator behind them, if that is what they are; setting up the
            graph is collective.
        graph: who the neighbours are.
    """

    def __init__(self, comm: Communicator, mpi_comm: Any, graph: Graph) -> None:
        self._comm = comm
        self._rows = graph.neighbours[comm.rank]
        self._graph_comm = mpi_comm and mpi_comm.Create_dist_graph_adjacent(list(self._rows), list(self._rows))
        self._received = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.bytes_sent = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy gathers everything: making its own graph would be collective."""
        return {**vars(self), "_graph_comm": None}

    def exchange(self, message: Tensor, name: str) -> Tensor:
        """Send ``message`` (1-D, same length everywhere) to every neighbour, and a checksum of four bytes.

        Returns:
            the neighbours' messages, a row each in the graph's order.

        Raises:
            RankMismatchError: when what came from a neighbour is not what it sent.
        """
        sealed = wire.seal(message.view(torch.uint8).unsqueeze(0))[0]
        self.bytes_sent += len(self._rows) * sealed.nbytes
        rows, intact = wire.open_sealed(self._gather(sealed, name))
        if not bool(intact.all()):
            damaged = {row for row, whole in zip(self._rows, intact.tolist(), strict=True) if not whole}
            raise RankMismatchError(
                f"rank {self._comm.rank}: what came from {ranks(damaged)} in {self._comm.in_words(name)} was damaged "
                "on its way, and was not taken in; look at the network between them, and go on from a checkpoint"
            )
        return rows.view(message.dtype)

    def _gather(self, message: Tensor, name: str) -> Tensor:
        """The neighbours' messages (uint8), valid until the next call."""
        if self._graph_comm is None:
            return self._comm.allgather(message, name)[list(self._rows)]
        if self._received.shape != (len(self._rows), message.numel()):
            self._received = torch.empty(len(self._rows), message.numel(), dtype=torch.uint8, device="cpu")
        request = self._graph_comm.Ineighbor_allgather(message.numpy(), self._received.view(-1).numpy())
        mpi: Any = self._comm
        return mpi.under_way(request, message, self._received, f"exchange {name}").wait()  # type: ignore[no-any-return]
