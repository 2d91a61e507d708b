"""`SwarmSGD`: every node trains on its own and now and then averages with one neighbour."""

from __future__ import annotations

import atexit
import math
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Unpack

import torch
from torch import Tensor

from hvd_sketch.comm import as_communicator
from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.comm.ending import ending
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.log import MethodLog
from hvd_sketch.methods.decentralized import Decentralized
from hvd_sketch.methods.graphs import graph_of
from hvd_sketch.methods.swarm.assembly import Assembly
from hvd_sketch.methods.swarm.meetings import Meeting, Meetings, SwarmStats
from hvd_sketch.methods.swarm.message import HEADER, Damaged, Header, Kind
from hvd_sketch.methods.swarm.node import Node
from hvd_sketch.methods.swarm.peers import Peers
from hvd_sketch.methods.swarm.settings import Settings, SwarmOptions
from hvd_sketch.settings import given_numbers

_LAST_WORDS = 2.0  # seconds for messages to leave when a node ends


class SwarmSGD(Decentralized):
    """Asynchronous decentralised SGD with local steps and quantised pairwise averaging.

    After H local steps node i picks a neighbour j at random. With X the model that trains, B its
    value when the current local steps began, and Y the published copy, which starts equal to X::

        non-blocking                                    blocking
        Y_i, Y_j <- averaged (see `Node`)               Y_i <- X_i, Y_j <- X_j, j at the end of its steps
        Y_i <- Y_i + (X_i - B_i)                        Y_i, Y_j <- averaged
        X_i, B_i <- Y_i                                 X_i, B_i, X_j, B_j <- Y_i, Y_j

    Non-blocking, j is not interrupted: its X_j and B_j stay, and the steps that it has under way
    count when it folds them in itself; nobody waits for another's gradients. Blocking, i waits
    until j has finished its current local steps. Both conserve the mean of ``X_i + Y_i - B_i``.

    Messages travel through a thread of this node's own (`hvd_sketch.comm.peer.Courier`), which
    answers while the main thread computes. A node never waits for a node that waits: one at rest
    answers at once, and where two pick each other at the same moment, the lower rank's meeting
    counts. So chains and rings of picks cannot deadlock. (In the blocking variant a script must not
    make its ranks wait for each other by other means between two steps.)

    Evaluate and save inside ``with optimizer.average_model():``, equally often on all ranks. Call
    `finish` at the end, or use the optimizer as a context manager: a node that is done keeps
    answering until all are. BatchNorm statistics stay with their node (averaging them with every meeting would
    mix statistics of other weights), inside `average_model` they are their mean.

    A node whose model is not finite when it should meet drops the steps since its last meeting,
    clears its optimizer's state and counts that in ``stats.skipped``; nothing such is ever sent,
    and `average_model` leaves such steps out too. Under a ``torch.amp.GradScaler`` a step that overflows
    is left out alone, and counted there.

    Memory: three times the model (Y, B, staging) and buffers of about four, in host memory; one
    more for every node that meets this one at the same moment, and after `average_model`.
    Sent: 16 bytes and the code (see `Lattice`) in each direction for every meeting.
    Source: Nadiradze, Sabour, Davies, Li, Alistarh, "Asynchronous Decentralized SGD with
    Quantized and Local Updates" (NeurIPS 2021), arXiv 1910.12308.

    Args:
        optimizer: takes the local steps; its state is never averaged.
        model: what it trains.
        comm: an mpi4py intracommunicator, ``MPI.COMM_WORLD`` by default.
        graph: complete, ring, torus, hypercube, or a networkx graph over the ranks.
        same_start: begin with rank 0's parameters and saved buffers on every rank.
        on_meeting: called with every finished `Meeting`, in either thread; for timelines.
        local_steps: H, or `Geometric` with H on average; 1 when not given.
        quantization: a `Lattice`; full precision when not given.
        blocking: the variant, see above; non-blocking when not given.
        seed: of the choice of partners and of geometric steps.
        patience: seconds without any sign of life after which a node that is waited for counts
            as lost, 60 when not given; more than one model takes to transfer.
        on_lost: ``raise`` a `PeerLost`, as when not given, or ``continue`` without it. MPI itself must
            be told to let others live: ``mpirun --enable-recovery`` with Open MPI 4.

    Raises:
        ConfigurationError: for arguments that cannot work, or MPI without MPI_THREAD_MULTIPLE.
        RankMismatchError: alike on all ranks, when models or settings differ. In `step` and in whatever waits, when
            what came from another node is not what it sent; nothing of it was taken in.
    """

    stats: SwarmStats

    @given_numbers
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module,
        comm: Any = None,
        graph: Any = "complete",
        same_start: bool = True,
        on_meeting: Callable[[Meeting], None] | None = None,
        **options: Unpack[SwarmOptions],
    ) -> None:
        from mpi4py import MPI

        from hvd_sketch.comm.peer import LARGEST_MESSAGE, Courier

        self.settings = settings = Settings(**options)
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            raise ConfigurationError(f"comm must be an mpi4py intracommunicator, got {comm!r}")
        self.graph = graph_of(graph, comm.size)
        agreed = {"graph": str(self.graph.neighbours), **self.settings.agreed()}
        super().__init__(optimizer, model, as_communicator(comm), agreed, same_start=same_start)
        self.stats, self.rank = SwarmStats(), comm.rank
        self._log = MethodLog(f"SwarmSGD({', '.join(f'{name}={value!r}' for name, value in options.items())})")
        self._published, self._base = self._flat.new(), self._flat.new()
        nbytes = self._published.vector.nbytes + HEADER
        if nbytes > LARGEST_MESSAGE:
            raise ConfigurationError(
                f"model has {nbytes} bytes, but one MPI message carries {LARGEST_MESSAGE} at most, and a meeting in "
                "full precision is one message: freeze parameters, or use a method with an allreduce"
            )
        self._random = random.Random(f"{settings.seed} {comm.rank}")
        self._spare, self._condition = Buffers(), threading.Condition()
        self._courier = Courier(comm, self._receive, self._spare)
        shared = (self._spare, self._condition)
        self._peers = Peers(self._courier, *shared, comm.rank, comm.size, settings.patience, settings.on_lost)
        self._assembly = Assembly(self._courier, self._peers, *shared)
        node = Node(self._published.vector, settings.quantization, self._spare)
        self._meetings = Meetings(
            *(node, self._courier, self._peers, self._condition, self.stats),
            patient=settings.blocking,
            on_meeting=on_meeting,
        )
        ending.aborts &= settings.on_lost == "raise"
        self._finished, self._steps_left = False, 0
        self.restart()
        self._courier.start()
        atexit.register(self._leave)

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigurationError(
            "SwarmSGD cannot be copied or pickled, for a thread answers other nodes in its name; save "
            "optimizer.state_dict(), and the model inside average_model()"
        )

    def finish(self) -> None:
        """Collective: wait, answering, until all nodes are done, and end the courier.

        The model stays as it is, and can still be evaluated on this rank; no steps can follow.

        Raises:
            PeerLost: when a node has gone or died, unless that is to be ignored.
            RuntimeError: alike on all ranks, when others wait for an average instead.
        """
        if self._finished:
            return
        self._wait_for_all(ending=True)
        with self._condition:
            away = self._peers.lost | self._peers.gone
        self._courier.stop(away, _LAST_WORDS)
        self._finished = True
        atexit.unregister(self._leave)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._leave()

    def advance(self, **keywords: Any) -> None:
        self._check()
        if float(vars(self).get("found_inf", 0.0)):
            self.stats.skipped += 1
        else:
            self.optimizer.step(**keywords)
        self._steps_left -= 1
        if self._steps_left == 0:
            self._steps_left = self.settings.steps(self._random)
            with self.stats.phase("meeting"):
                self._meet()
            self.stats.bytes_sent = self._courier.bytes_sent

    def _meet(self) -> None:
        if self.settings.blocking:
            self._fold()
            self._meetings.rest()
        present = self._peers.present(self.graph.neighbours[self.rank])
        if present:
            self._meetings.visit(self._random.choice(present))
        if not self.settings.blocking:
            self._fold()
        with self._condition:
            self._adopt()
            self._meetings.resume()

    def _fold(self) -> None:
        """Add the local work since the last meeting to the published model; drop it if it is not finite."""
        if self._read_work():
            with self._condition:
                self._published.vector.add_(self._live.vector)
        else:
            self.optimizer.state.clear()
            self.stats.skipped += 1

    def _read_work(self) -> bool:
        """Put the local work since the last meeting, X - B, into `_live`; zero, and False, if it is not finite."""
        self._flat.read(self._live)
        work = self._live.vector.sub_(self._base.vector)
        finite = math.isfinite(torch.linalg.vector_norm(work, math.inf))
        if not finite:
            work.zero_()
        return finite

    def _adopt(self) -> None:
        """Go on from the published model; what the parameters' dtype cannot hold stays published."""
        self._flat.write(self._published)
        self._flat.read(self._base)

    def restart(self) -> None:
        self._steps_left = self.settings.steps(self._random)
        with self._condition:
            self._flat.read(self._published)
            self._base.vector.copy_(self._published.vector)

    def _contribution(self) -> Tensor:
        self._wait_for_all()  # then no meeting is half done anywhere
        self._read_work()
        with self._condition:
            return self._live.vector.add_(self._published.vector)

    def _check(self) -> None:
        if self._finished:
            raise RuntimeError("SwarmSGD is finished: the other nodes do not answer any more")
        self._peers.check()

    def _average(self, vector: Tensor) -> None:
        self._check()
        self._meetings.rest()
        self._assembly.mean(vector)
        self._meetings.resume()
        self.stats.bytes_sent = self._courier.bytes_sent

    def _wait_for_all(self, *, ending: bool = False) -> None:
        share = torch.full((1,), float(ending), dtype=self._flat.dtype, device="cpu")
        self._average(share)
        if float(share) != float(ending):
            raise RuntimeError(
                f"{float(share):.0%} of the nodes called finish(), the others average_model() or "
                "consensus_distance(); call these equally often on all ranks: by the clock rather than by steps, "
                "of which a fast node takes more"
            )

    def _receive(self, source: int, message: Tensor) -> None:
        """In the courier's thread: hand a message to whom it concerns."""
        try:
            header = Header.read(message)
        except Damaged:
            with self._condition:
                self._peers.note_damage(source)
            return
        with self._condition:
            self._peers.heard(source, header.kind)
            if header.kind in (Kind.MEET, Kind.ANSWER, Kind.TOO_FAR, Kind.VOID):
                self._meetings.receive(source, header, message)
            else:
                if header.kind == Kind.PING:
                    self._peers.tell(source, Kind.PONG)
                elif header.kind in (Kind.SHARE, Kind.MEAN, Kind.ASK):
                    self._assembly.receive(source, header, message, self._flat.dtype)
                self._spare.give(message)
            self._condition.notify_all()

    def _leave(self) -> None:
        """End without waiting, and say so."""
        if self._finished:
            return
        self._finished = True
        with self._condition:
            away = self._peers.lost | self._peers.gone
            for rank in range(self._peers.size):
                if rank != self.rank and rank not in away:
                    self._peers.tell(rank, Kind.GONE)
        self._courier.stop(away, _LAST_WORDS)
