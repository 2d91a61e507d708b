"""Collectives through Horovod, by name, on a process set."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.comm.delay import NOTABLE
from hvd_sketch.comm.patience import limit_of, ranks, wait_until
from hvd_sketch.errors import RankLostError

_DYNAMIC = "HOROVOD_DYNAMIC_PROCESS_SETS"
_PAUSE = 1e-4
_SAMPLES = 3
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers, by their bytes."""

CARRIED = {*_WHOLE.values(), torch.int8, torch.float16, torch.float32, torch.float64}
"""What Horovod sends; not bfloat16, nor bool, nor complex numbers."""


def as_carried(tensor: Tensor) -> Tensor:
    """A contiguous tensor as one of a type that Horovod sends, in the same memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor if tensor.dtype in CARRIED else tensor.view(_WHOLE[tensor.element_size()])


class _Handle(Pending):
    """An operation of Horovod's own thread, which needs no polling."""

    def __init__(self, handle: int, result_of: Callable[[Any], Tensor], comm: HorovodCommunicator, what: str) -> None:
        self._handle, self._result_of, self._comm, self._what = handle, result_of, comm, comm.in_words(what)
        self._awaited: Tensor | None = None

    def wait(self) -> Tensor:
        if self._awaited is None:
            self._awaited = self._await()
        return self._awaited

    def _await(self) -> Tensor:
        limit = self._comm.limit
        if not wait_until(self._done, _nothing, limit):
            atexit.register(_end_at_once)
            raise RankLostError(self._comm.too_late(self._what))
        with self._comm.noting(self._what):
            return self._result_of(hvd.synchronize(self._handle))

    def _done(self) -> bool:
        if hvd.poll(self._handle):
            return True
        time.sleep(_PAUSE)  # for Horovod's thread
        return False


def _nothing(share: float) -> None:
    return


def _process_set(ranks: Sequence[int]) -> hvd.ProcessSet:
    """Collective among all ranks: the one of these, which may be there already."""
    found = hvd.ProcessSet(ranks)
    known = hvd.mpi_ops._basics._get_process_set_ids_and_ranks()
    found.process_set_id = next((number for number, its in known.items() if tuple(its) == tuple(ranks)), None)
    return found if found.process_set_id is not None else hvd.add_process_set(found)


def _end_at_once() -> None:
    """Registered behind Horovod's own shutdown, so called before it, which would wait for the same rank again."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class HorovodCommunicator(Communicator):
    """Horovod's own collectives; rank and size follow elastic resets.

    Only named operations are used: Horovod numbers unnamed ones per process, and one extra
    call on one rank would pair all later ones wrongly. Sums and no averages, so that a rank
    that has joined (``hvd.join``) does not change the divisor between two rounds.

    Args:
        process_set: the ranks that take part; all of them when not given.
        timeout: seconds that a rank waits for the others in one collective; by default
            the environment's ``HVD_SKETCH_TIMEOUT``, or half an hour.

    Raises:
        RankLostError: when others do not come. Horovod ends by itself what waits for a rank that has ended.
    """

    negotiates = True

    def __init__(self, process_set: Any = None, timeout: float | None = None) -> None:
        self.process_set = hvd.global_process_set if process_set is None else process_set
        self.limit = limit_of(timeout)

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Inside, an error of Horovod's, which it has when another rank has ended, says what this rank was in."""
        try:
            yield
        except HorovodInternalError as error:
            error.add_note(f"hvd_sketch: rank {self.rank} was in {what}")
            raise

    def too_late(self, what: str) -> str:
        """What to say when others did not come in time."""
        others = set(range(self.size)) - {self.rank}
        return (
            f"rank {self.rank}: waited {self.limit:g} s in {what} for {'one of ' * (len(others) > 1)}{ranks(others)}: "
            "stopped, cut off, or busy with something else; Horovod's own log may say which. Where steps may take "
            "longer, raise HVD_SKETCH_TIMEOUT (seconds)"
        )

    def look_at_links(self) -> None:
        """Time a small sum: ``2 (W-1)`` crossings to ask and as many for the sum; nothing on one host."""
        if hvd.local_size() == hvd.size():
            return
        samples = []
        for _ in range(_SAMPLES):
            began = time.perf_counter()
            self.post_allreduce(torch.zeros(1, dtype=torch.float32, device="cpu"), "hvd_sketch.crossing").wait()
            samples.append(time.perf_counter() - began)
        self.crossing = min(samples[1:]) / max(1, 4 * (self.size - 1))  # the first one waits for ranks that are late

    def remarks(self) -> list[str]:
        """Whether asking is what a step waits for, and what to start instead."""
        if self.crossing < NOTABLE:
            return []
        asking, crossing = 2 * (self.size - 1) * self.crossing, 1e3 * self.crossing
        return [
            f"messages take {crossing:.0f} ms: before each collective Horovod's ranks ask each other, 2 (W-1) times "
            f"that, {asking:.2g} s, and its sums go around a ring, as long again; start with mpirun and give "
            "comm=MPI.COMM_WORLD of mpi4py, or start with torchrun: neither asks, and sums are direct"
        ]

    @property
    def rank(self) -> int:
        return int(self.process_set.rank())

    @property
    def size(self) -> int:
        return int(self.process_set.size())

    @property
    def world_size(self) -> int:
        """Of the global process set; not known before Horovod is initialised, and then not asked for."""
        return int(hvd.size()) if hvd.is_initialized() else 2

    @property
    def local(self) -> tuple[int, int]:
        """As Horovod's launcher, or MPI, told it."""
        return int(hvd.local_rank()), int(hvd.local_size())

    @property
    def host(self) -> str:
        """Its name, as Horovod's launcher was told it."""
        return os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()

    @property
    def obstacle(self) -> str:
        """Process sets are made after the start only where a variable was set before it."""
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            return "under elastic training hosts come and go"
        if self.process_set.process_set_id != 0:
            return "these are the ranks of a process set, and only all ranks of Horovod's are put into groups"
        if int(os.environ.get(_DYNAMIC) or 0) == 0:
            return (
                f"Horovod puts ranks into groups only where {_DYNAMIC}=1 was set on all of them before hvd.init(), or "
                'after hvd.init(process_sets="dynamic")'
            )
        return ""

    @property
    def sends_by_tcp(self) -> bool:
        """Where it was started without MPI."""
        return bool(hvd.gloo_enabled())

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """A process set. All ranks make those of all, in the same order, and Horovod makes each of them once."""
        told = self.allgather_object(sorted(ranks), "hvd_sketch.subgroup")
        made = {group: _process_set(group) for group in sorted(set(map(tuple, told)))}
        return HorovodCommunicator(made[tuple(sorted(ranks))], self.limit)

    def apart(self) -> Communicator:
        """Any thread may begin Horovod's operations, which go by their names."""
        return HorovodCommunicator(self.process_set, self.limit)

    @property
    def group(self) -> str:
        """The number of the process set."""
        return str(self.process_set.process_set_id)

    @property
    def included(self) -> bool:
        """Whether this process belongs to the process set."""
        return bool(self.process_set.included())

    def reaches(self, device: torch.device) -> bool:
        """Host memory; a GPU's when Horovod was built for GPUs, else it would reduce what has not arrived yet."""
        return device.type == "cpu" or bool(hvd.nccl_built() or hvd.cuda_built())

    def post_allreduce(self, tensor: Tensor, name: str) -> Pending:
        return self._start(
            hvd.allreduce_async_, tensor, f"allreduce {name}", lambda result: tensor, name=name, op=hvd.Sum
        )

    def post_allgather(self, tensor: Tensor, name: str) -> Pending:
        return self._start(
            hvd.allgather_async, tensor, f"allgather {name}", lambda gathered: gathered.view(self.size, -1), name=name
        )

    def post_alltoall(self, tensor: Tensor, name: str) -> Pending:
        # the second result tells how much came from whom
        return self._start(
            hvd.alltoall_async, tensor.contiguous(), f"alltoall {name}", lambda received: received[0], name=name
        )

    def run_broadcast(self, tensor: Tensor, root: int, name: str) -> None:
        what, among_all = f"broadcast {name} from rank {root}", self.process_set.ranks[root]
        carried = as_carried(tensor)
        self._start(hvd.broadcast_async_, carried, what, lambda result: tensor, name=name, root_rank=among_all).wait()

    def _start(
        self, begin: Callable[..., int], tensor: Tensor, what: str, result_of: Callable[[Any], Tensor], **options: Any
    ) -> Pending:
        """Begin one of Horovod's operations in this process set."""
        with self.noting(self.in_words(what)):
            handle = begin(tensor, process_set=self.process_set, **options)
        return _Handle(handle, result_of, self, what)
