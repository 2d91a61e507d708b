"""The collectives of an exchange: their names, their headers, and what the headers bring about."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.coarse import Coarse, sum_coarsely
from hvd_sketch.scope import next_scope
from hvd_sketch.stats import Stats

_EIGHT_BITS = Coarse(8, floating=True)


class Rounds:
    """Collectives in one fixed order on all ranks; the first message of a step begins with a `wire.Header`.

    In its sum every rank reads the same: whether all gradients are finite, who took part, whether
    some rank has a problem, or wants everything to be sent.

    Attributes:
        all_present: whether every rank took part in the last step; one that has joined does not.
        flushes: whether the present step sends everything, because some rank asked for it.
        incomplete: whether this rank has no gradient for some parameter.
        on_incomplete: called before a step is taken for which some rank lacks a gradient; may communicate.
    """

    def __init__(self, comm: Communicator, stats: Stats) -> None:
        self.comm, self._stats = comm, stats
        self.all_present, self.flushes = True, False
        self.incomplete = False
        self.on_incomplete: Callable[[], None] = _nothing
        self._flush_asked = False
        self._problem: str | None = None
        self._scope: str | None = None

    def name_of(self, what: str) -> str:
        """The name of one of this exchange's collectives, from the first run on."""
        if self._scope is None:
            self._scope = next_scope(self.comm.group)
        return f"{self._scope}.{what}"

    def ask_to_flush(self, asked: bool = True) -> None:
        """Ask all ranks to send everything in the next step, or no longer."""
        self._flush_asked = asked

    def fail_together(self, problem: str | None) -> None:
        """Note a problem of the coming step, the first one counts; None forgets it."""
        self._problem = problem and (self._problem or problem)

    def sum(self, message: Tensor, finite: bool | Tensor, what: str) -> bool:
        """Allreduce the first message of a step; False if some rank is not finite or wants to flush.

        Raises:
            ConfigurationError: see `heed`.
        """
        with self._stats.phase("exchange"):
            self.start_sum(message, finite, what).wait()
        return self.heed(wire.read_header(message))

    def start_sum(self, message: Tensor, finite: bool | Tensor, what: str) -> Pending:
        """Begin to sum a message of the step over the ranks, under its header."""
        problem = self._problem is not None
        wire.write_header(message, finite, incomplete=self.incomplete, problem=problem, flush=self._flush_asked)
        return self.comm.start_allreduce(message, self.name_of(what))

    def heed(self, header: wire.Header) -> bool:
        """Whether the step that a header speaks for is to be taken.

        Raises:
            ConfigurationError: alike on all ranks, with every rank's problem, when any of them has one.
        """
        if header.problem:
            problems = self.comm.allgather_object(self._problem, self.name_of("problems"))
            self._problem = None
            lines = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
            raise ConfigurationError("hvd_sketch: the step was not taken. " + "\n".join(lines))
        self.all_present = header.present == self.comm.size
        self.flushes = header.finite and header.flush
        taken = header.finite and not header.flush
        if taken and header.incomplete:
            self.on_incomplete()
        return taken

    def sum_values(self, values: Tensor, what: str) -> None:
        """Between two steps: replace ``values`` by their sum over the ranks."""
        with self._stats.counting(self.comm), self._stats.phase("exchange"):
            self.comm.allreduce(values, self.name_of(what))

    def sum_coarsely(self, values: Tensor, what: str) -> None:
        """The same, in floats of eight bits, see `Coarse`; in float32 where a rank has left with ``hvd.join``."""
        if not self.all_present:
            self.sum_values(values, what)
            return
        with self._stats.counting(self.comm), self._stats.phase("exchange"):
            summed = sum_coarsely(values.flatten(), _EIGHT_BITS, self.comm, self.name_of(what))
            values.copy_(summed.total.view_as(values))


def _nothing() -> None:
    return
