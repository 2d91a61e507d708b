"""What the rest of the library knows of a network: a handful of collectives."""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hvd_sketch.comm.copies import majority, thrice
from hvd_sketch.comm.delay import NOTABLE
from hvd_sketch.comm.direct import LARGEST, Direct, pays
from hvd_sketch.comm.launcher import on_host
from hvd_sketch.comm.pending import Pending
from hvd_sketch.comm.staged import HostStaging
from hvd_sketch.errors import ConfigurationError, RankMismatchError

__all__ = ["Communicator", "Pending"]


_makers: list[Callable[[], Communicator]] = []


def made_by(maker: Callable[[], Communicator]) -> None:
    """From now on, what is loaded from a pickle is made so."""
    _makers.append(maker)


def _made_again() -> Communicator:
    return _makers[-1]()


class Communicator(ABC):
    """Collectives over ``size`` ranks, and a count of the bytes this rank sends.

    Every rank calls the same methods in the same order. ``name`` tells concurrent operations
    apart where the backend matches by name. What ``start_…`` began is awaited by `Pending.wait`, and
    its tensors are to be left alone until then. Where a `crossing` takes long, sums travel as direct messages, see
    `hvd_sketch.comm.direct`. Bytes are those of the bandwidth-optimal ring,
    counted the same way for compressed and dense messages: ``2 (W-1)/W n`` for an allreduce of
    n bytes, ``(W-1) n`` for an allgather of n bytes a rank,
    ``(W-1)/W n`` for an alltoall of n bytes, n for a broadcast by the root.
    """

    bytes_sent: int = 0
    occupation: str = ""
    """What the coming collectives are for, such as "step 7", to be told when one of them fails."""
    muted: bool = False
    """Whether this rank adds zeros to every sum, for it has joined."""
    negotiates: ClassVar[bool] = False
    """Whether the backend asks all ranks before each collective, so that two of them take longer than one."""
    gathers_by_ring: ClassVar[bool] = False
    """Whether the backend passes an allgather around a ring."""

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> Any:
        """What is loaded from a pickle has whatever ranks there are then."""
        return _made_again, ()

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's number, 0 … size - 1."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of processes; may change between steps under elastic training."""

    @property
    def world_size(self) -> int:
        """Number of processes that are connected, also outside of this communicator."""
        return self.size

    @property
    def local(self) -> tuple[int, int]:
        """This process's number on its host, and how many there are, as the launcher says."""
        return on_host()

    @property
    def host(self) -> str | None:
        """A name that ranks have in common which share a host; None where nobody tells."""
        return None

    @property
    def sends_by_tcp(self) -> bool:
        """Whether large messages take that way also between ranks of one host."""
        return False

    @property
    def obstacle(self) -> str:
        """Why these ranks cannot be put into groups, and what helps; empty where they can, alike on all ranks."""
        return ""

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """Collective: a communicator of some ranks, this one among them; the others give those of theirs.

        Raises:
            ConfigurationError: where the backend cannot.
        """
        raise ConfigurationError(
            f"the ranks of {type(self).__name__} cannot be put into groups, which hierarchical asks for; start with "
            "mpirun and give comm=MPI.COMM_WORLD of mpi4py, or start with torchrun, or give hierarchical=False"
        )

    def apart(self) -> Communicator:
        """Collective: the same ranks once more, to be used by another thread while this one is used as well.

        Raises:
            ConfigurationError: where the backend cannot.
        """
        return self.subgroup(range(self.size))

    @property
    def group(self) -> str:
        """A name for the ranks that take part, to tell process sets apart."""
        return "all"

    @property
    def included(self) -> bool:
        """Whether this process takes part at all; outside a process set it does not."""
        return True

    @cached_property
    def crossing(self) -> float:
        """Seconds that small messages from all to all take, the same on all ranks; 0 where it does not matter.

        Collective at its first use, where a backend measures it. It may be set before, alike on all ranks.
        """
        return 0.0

    def allreduce(self, tensor: Tensor, name: str) -> None:
        """Replace ``tensor`` (contiguous) by its sum over the ranks, bit-identical on all of them."""
        self.start_allreduce(tensor, name).wait()

    def start_allreduce(self, tensor: Tensor, name: str, *, in_turn: bool = True) -> Pending:
        """Begin to `allreduce`.

        Args:
            tensor: what to sum.
            name: of the operation.
            in_turn: whether all ranks will wait for it, and in the same order among their other operations.
        """
        self.bytes_sent += self.allreduce_bytes(tensor.nbytes)
        if self.muted:
            tensor.zero_()
        direct = self._direct if in_turn and 0 < tensor.nbytes <= LARGEST else None
        return self._post(self.post_allreduce if direct is None else direct.post_sum, tensor, name, tensor)

    def allgather(self, tensor: Tensor, name: str) -> Tensor:
        """Stack every rank's ``tensor`` (1-D, same length on all ranks) to shape ``(size, n)``."""
        return self.start_allgather(tensor, name).wait()

    def start_allgather(self, tensor: Tensor, name: str) -> Pending:
        """Begin to `allgather`."""
        self.bytes_sent += (self.size - 1) * tensor.nbytes
        direct = self._direct
        return self._post(self.post_allgather if direct is None else direct.post_gather, tensor, name)

    def alltoall(self, tensor: Tensor, name: str) -> Tensor:
        """Send row j of ``tensor``, shape ``(size, n)``, to rank j; row i of the result is rank i's."""
        return self.start_alltoall(tensor, name).wait()

    def start_alltoall(self, tensor: Tensor, name: str) -> Pending:
        """Begin to `alltoall`."""
        self.bytes_sent += (self.size - 1) * tensor.nbytes // self.size
        return self._post(self.post_alltoall, tensor, name)

    def reduce_scatter(self, rows: Tensor, name: str, look: Callable[[Tensor], None]) -> Tensor:
        """The sum over the ranks of this rank's row of ``rows``, shape ``(size, n)``; sends as an alltoall of them.

        ``look`` is called with the rows that came before they are added, where they were sent.
        """
        received = self.alltoall(rows, name)
        look(received)
        return received.sum(dim=0)

    def broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        """Replace ``tensor`` (contiguous) by the root's."""
        self.bytes_sent += tensor.nbytes if self.rank == root and self.size > 1 else 0
        if self.reaches(tensor.device):
            self.run_broadcast(tensor, root, name)
            return
        self._staging.post_until(None)
        on_host = tensor.cpu()
        self.run_broadcast(on_host, root, name)
        tensor.copy_(on_host)

    @property
    def sends_directly(self) -> bool:
        """Whether sums travel as direct messages, because messages take long; alike on all ranks."""
        return self._direct is not None

    def look_at_links(self) -> None:
        """Collective, when the ranks have agreed on what they train: measure what is not known of the links."""
        _ = self.crossing

    def remarks(self) -> list[str]:
        """What there is to say of the links: how long messages take where that matters, and what is done about it."""
        if self.negotiates or self.crossing < NOTABLE:
            return []
        told = "sums travel directly" if self.sends_directly else "ranks are too many for direct sums"
        return [f"messages take {1e3 * self.crossing:.0f} ms; {told}"]

    def reaches(self, device: torch.device) -> bool:
        """Whether ``post_…`` takes tensors that live there; others come by way of the host."""
        return True

    def starts_in_backward(self, device: torch.device) -> bool:
        """Whether a collective of tensors that live there may start while backward runs."""
        return True

    def in_words(self, what: str) -> str:
        """An operation for an error: what it is, and what it is for."""
        return f"{what} of {self.occupation}" if self.occupation else what

    def allreduce_bytes(self, nbytes: int) -> int:
        """Bytes one rank sends in a ring allreduce of ``nbytes``."""
        return 2 * (self.size - 1) * nbytes // self.size

    def allgather_object(self, value: Any, name: str) -> list[Any]:
        """Every rank's value, by rank, as JSON has it; None of a rank that has joined. For small things, rarely.

        Two sums, of the lengths and of the bytes, in which each rank has a row: sums go on where somebody has joined.

        Raises:
            RankMismatchError: when what came is not what was sent.
        """
        text = json.dumps(value).encode()
        told = torch.zeros(self.size, 2, dtype=torch.int64, device="cpu")
        told[self.rank] = torch.tensor([len(text), zlib.crc32(text)], dtype=torch.int64, device="cpu")
        message = thrice(told.view(-1))
        self.allreduce(message, f"{name}.length")
        known = majority(message.tolist())
        lengths, checksums = known[::2], known[1::2]
        rows = torch.zeros(self.size, -(-max(lengths) // 4), dtype=torch.int32, device="cpu")
        own = rows[self.rank].view(torch.uint8)[: lengths[self.rank]]
        own.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8)[: own.numel()])
        self.allreduce(rows.view(-1), f"{name}.payload")
        texts = [row[:length].numpy().tobytes() for row, length in zip(rows.view(torch.uint8), lengths, strict=True)]
        for rank, (content, checksum) in enumerate(zip(texts, checksums, strict=True)):
            if zlib.crc32(content) != checksum:
                raise RankMismatchError(f"rank {self.rank}: what rank {rank} said in {name} was damaged on the way")
        return [json.loads(text) if text else None for text in texts]

    def _post(
        self, post: Callable[[Tensor, str], Pending], tensor: Tensor, name: str, into: Tensor | None = None
    ) -> Pending:
        if not self.reaches(tensor.device):
            return self._staging.post(lambda on_host: post(on_host, name), tensor, into)
        self._staging.post_until(None)
        return post(tensor, name)

    @cached_property
    def _direct(self) -> Direct | None:
        """Direct messages, where they are faster."""
        if self.negotiates or not pays(self.size, self.crossing):
            return None
        gather = None if self.gathers_by_ring else self.post_allgather
        return Direct(self.size, self.post_alltoall, gather, lambda: self._staging.post_until(None))

    @cached_property
    def _staging(self) -> HostStaging:
        return HostStaging()

    @abstractmethod
    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        """What a backend does for `start_allreduce`; the same for the others."""

    @abstractmethod
    def post_allgather(self, tensor: Tensor, name: str) -> Pending: ...

    @abstractmethod
    def post_alltoall(self, tensor: Tensor, name: str) -> Pending: ...

    @abstractmethod
    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None: ...
