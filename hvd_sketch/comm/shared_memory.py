"""Large messages among the ranks of a host by memory that they share, for backends that would send them by TCP."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending

_FOLDER = Path("/dev/shm")
_SMALLEST = 2**16
"""Bytes; what is shorter is sent as soon as the ranks have met."""


class SharedMemory(Communicator):
    """Another communicator, whose ranks are on one host, with large gathers and sums of parts by shared memory.

    A rank writes into its row of a table, waits for the others, and reads. Two tables take turns: whoever writes into
    one again has met all the others since they read it. A table is made at its first use, and again where it is too
    small; where it cannot be had, because ranks do not share ``/dev/shm`` or it is full, messages go as they would
    without. Its file has no name any more when it is in use, so nothing stays behind, however the ranks end.

    What `allgather` returns of large tensors is the table itself, to be read before the next but one such operation.
    A GPU's tensors are the other communicator's. Bytes are counted as if they were sent.

    Args:
        inner: the other one.
    """

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self._tables = [torch.empty(0, dtype=torch.uint8, device="cpu")] * 2
        self._turn, self._possible = 0, _FOLDER.is_dir()

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def occupation(self) -> str:
        """The other's."""
        return self._inner.occupation

    @occupation.setter
    def occupation(self, occupation: str) -> None:
        self._inner.occupation = occupation

    def reaches(self, device: torch.device) -> bool:
        """As far as the other."""
        return self._inner.reaches(device)

    def reduce_scatter(self, rows: Tensor, name: str, look: Callable[[Tensor], None]) -> Tensor:
        """As for every communicator; summed where it was written."""
        table = self._table(rows)
        if table is None:
            return super().reduce_scatter(rows, name, look)
        self.bytes_sent += (self.size - 1) * rows.nbytes // self.size
        self._write(table, rows, name)
        return table.view(self.size, *rows.shape)[:, self.rank].sum(dim=0)

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        return self._inner.post_allreduce(tensor, name)

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        table = self._table(tensor)
        if table is None:
            return self._inner.post_allgather(tensor, name)
        self._write(table, tensor, name)
        return Pending(table)

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        return self._inner.post_alltoall(tensor, name)

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        self._inner.run_broadcast(tensor, root, name)

    def _write(self, table: Tensor, tensor: Tensor, name: str) -> None:
        """Collective: afterwards all rows are there."""
        table[self.rank].copy_(tensor.reshape(-1))
        self._inner.post_allreduce(torch.zeros(1, dtype=torch.float32, device="cpu"), f"{name}.written").wait()

    def _table(self, tensor: Tensor) -> Tensor | None:
        """Collective: where every rank has a row for such a tensor; None where it is to be sent."""
        if not self._possible or tensor.device.type != "cpu" or tensor.nbytes < _SMALLEST:
            return None
        self._turn = 1 - self._turn
        nbytes = self.size * tensor.nbytes
        if self._tables[self._turn].numel() < nbytes:
            self._make(nbytes)
        return self._tables[self._turn][:nbytes].view(tensor.dtype).view(self.size, -1) if self._possible else None

    def _make(self, nbytes: int) -> None:
        """Collective: map memory of all ranks, or find that it cannot be had."""
        made = _made(nbytes) if self.rank == 0 else ""
        path = self.allgather_object(made, "hvd_sketch.shared")[0]
        mapped = _mapped(path, nbytes) if path else None
        self._possible = all(self.allgather_object(mapped is not None, "hvd_sketch.shared"))
        if made:
            Path(made).unlink()
        if mapped is not None and self._possible:
            self._tables[self._turn] = mapped


def _made(nbytes: int) -> str:
    """The path of a new file in memory, all of which is there; empty where there is no room for it."""
    try:
        number, path = tempfile.mkstemp(prefix="hvd_sketch.", dir=_FOLDER)
    except OSError:
        return ""
    try:
        os.posix_fallocate(number, 0, nbytes)  # what is missing would end the process when it is written to
    except OSError:
        Path(path).unlink()
        return ""
    finally:
        os.close(number)
    return path


def _mapped(path: str, nbytes: int) -> Tensor | None:
    """The bytes of a file, shared with whoever maps it; None where it is not there, as on another host."""
    try:
        with open(path, "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
    except OSError:
        return None
