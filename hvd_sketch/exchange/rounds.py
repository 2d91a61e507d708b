"""The collectives of an exchange: their names, their headers, and what the headers bring about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.comm.copies import thrice
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.exchange.coarse import Coarse, sum_coarsely
from hvd_sketch.exchange.drift import Drift
from hvd_sketch.scope import generation, next_scope
from hvd_sketch.stats import Stats

_FEW = 64
_EIGHT_BITS = Coarse(8, floating=True)


class Rounds:
    """Collectives in one fixed order on all ranks; the first message of a step begins with a `wire.Header`.

    In its sum every rank reads the same: whether all gradients are finite, who took part, whether
    some rank has a problem, or wants everything to be sent.

    Attributes:
        present: how many ranks took part in the last step; one that has joined does not.
        all_present: whether all did.
        partial: steps of this rank that some other did not take part in, since somebody last set it to 0.
        flushes: whether the present step sends everything, because some rank asked for it.
        flush_asked: whether this rank asks for it in the coming step.
        regular: whether all ranks took part in the last step, and none lacked a gradient.
        incomplete: whether this rank has no gradient for some parameter.
        digest: of what all ranks should hold alike, for the header of the step that `sum` takes.
        on_incomplete: called before a step is taken for which some rank lacks a gradient; may communicate.
    """

    def __init__(self, comm: Communicator, stats: Stats, drift: Drift) -> None:
        self.comm, self._stats, self._drift = comm, stats, drift
        self.digest: Tensor | None = None
        self._damages: list[tuple[Tensor, str]] = []
        self.present, self.partial = 0, 0
        self.all_present, self.flushes, self.regular = True, False, True
        self.incomplete = False
        self.on_incomplete: Callable[[], None] = _nothing
        self.flush_asked = False
        self._problem: str | None = None
        self._scope, self._generation = "", -1

    def name_of(self, what: str) -> str:
        """The name of one of this exchange's collectives, from the first run on."""
        if self._generation != generation():
            self._scope, self._generation = next_scope(self.comm.group), generation()
        return f"{self._scope}.{what}"

    def ask_to_flush(self, asked: bool = True) -> None:
        """Ask all ranks to send everything in the next step, or no longer."""
        self.flush_asked = asked

    def fail_together(self, problem: str | None) -> None:
        """Note a problem of the coming step, the first one counts; None forgets it."""
        self._problem = problem and (self._problem or problem)

    def begin_again(self) -> None:
        """Forget a step that was broken off."""
        self.digest, self._problem, self.flush_asked = None, None, False
        self._damages.clear()

    def note_damage(self, damaged: Tensor, what: str) -> None:
        """Note whether something came otherwise than it was sent: a bool of its device, for which nobody waits.

        Then the next step raises on all ranks; in this one, others would wait for a rank that raises.
        """
        self._damages.append((damaged, what))

    def unseal(self, received: Tensor, what: str) -> Tensor:
        """Rows of bytes that were sealed; those that were damaged on the way are noted, and zero."""
        rows, intact = wire.open_sealed(received)
        self.note_unsealed(intact.all(), what)
        return rows.mul_(intact.unsqueeze(1))

    def note_unsealed(self, intact: Tensor, what: str) -> None:
        """Note whether what was sealed came as it was sent: a bool of its device."""
        self.note_damage(~intact, f"what came in {what} of {self.comm.occupation} is not what was sent")

    def sum(self, message: Tensor, finite: bool | Tensor, what: str) -> bool:
        """Allreduce the first message of a step; False if some rank is not finite or wants to flush.

        Raises:
            ConfigurationError, RankMismatchError: see `heed`.
        """
        with self._stats.phase("exchange"):
            self.start_sum(message, finite, what).wait()
        return self.heed(wire.read_header(message))

    def start_sum(self, message: Tensor, finite: bool | Tensor, what: str) -> Pending:
        """Begin to sum a message of the step over the ranks, under its header."""
        self.write_header(message, finite)
        return self.comm.start_allreduce(message, self.name_of(what))

    @property
    def ranks_each(self) -> int:
        """For how many ranks a header speaks before it is summed."""
        return 1

    def header(self, finite: bool, device: torch.device) -> Tensor:
        """This rank's header, to ride in a message to each rank; see `wire.pack_header`."""
        header = torch.zeros(wire.HEADER, dtype=torch.float32, device=device)
        if not self.comm.muted:
            self.write_header(header, finite)
        return header

    def write_header(self, message: Tensor, finite: bool | Tensor) -> None:
        """Put what this rank has to say of the step in front of a message."""
        damages = [damaged for damaged, _ in self._damages]
        problem = self._problem is not None or (bool(damages) and torch.stack(damages).any())
        wire.write_header(message, finite, incomplete=self.incomplete, problem=problem, flush=self.flush_asked)
        digest = message[wire.DIGEST]
        digest.zero_() if self.digest is None else digest.copy_(self.digest)

    def heed(self, header: wire.Header) -> bool:
        """Whether the step that a header speaks for is to be taken.

        Raises:
            ConfigurationError: alike on all ranks, with every rank's problem, when any of them has one.
            RankMismatchError: alike on all ranks, when a message was damaged, or when they hold other things.
        """
        self.digest = None
        if header.problem:
            raise self._problems()
        self._damages.clear()
        if not header.agreed:
            raise self._drift.tell(self.comm, self.name_of)
        self.present, self.all_present = int(header.present), header.present == self.comm.size
        self.partial += not self.all_present
        self.regular = header.regular(self.comm.size)
        self.flushes = header.finite and header.flush
        taken = header.finite and not header.flush
        if taken and header.incomplete:
            self.on_incomplete()
        return taken

    def sum_values(self, values: Tensor, what: str) -> None:
        """Between two steps: replace ``values`` by their sum over the ranks.

        Few ones, on which sizes of messages may depend, are sent three times, and damage to one of them does no harm.
        """
        few = values.numel() <= _FEW
        message = thrice(values.view(-1)) if few else values
        with self._stats.counting(self.comm), self._stats.phase("exchange"):
            self.comm.allreduce(message, self.name_of(what))
        if few:
            one, other, third = message.view(3, *values.shape)
            values.copy_(torch.where((one == other) | (one == third), one, other))
        if self.all_present and self.comm.size > 1:
            self._drift.note(values)

    def sum_coarsely(self, values: Tensor, what: str) -> None:
        """The same, in floats of eight bits, see `Coarse`; in float32 where a rank has left in ``hvd.join``."""
        if not self.all_present:
            self.sum_values(values, what)
            return
        with self._stats.counting(self.comm), self._stats.phase("exchange"):
            summed = sum_coarsely(values.flatten(), _EIGHT_BITS, self.comm, self.name_of(what), self.unseal)
            values.copy_(summed.total.view_as(values))
        if self.comm.size > 1:
            self._drift.note(values)

    def take_over(self, values: Tensor, what: str) -> None:
        """After a step that all took part in: replace ``values`` by rank 0's."""
        with self._stats.counting(self.comm), self._stats.phase("exchange"):
            self.comm.broadcast(values, 0, self.name_of(what))
        self._drift.note(values)

    def _problems(self) -> Exception:
        """Collective: what is wrong on which rank."""
        damage = next((what for damaged, what in self._damages if bool(damaged)), None)
        told = self.comm.allgather_object([self._problem, damage], self.name_of("problems"))
        self._problem = None
        self._damages.clear()
        known = [(rank, *each) for rank, each in enumerate(told) if each]  # none of a rank that has joined
        lines = [f"rank {rank}: {problem or damage}" for rank, problem, damage in known if problem or damage]
        kind = ConfigurationError if any(problem for _, problem, _ in known) else RankMismatchError
        return kind("hvd_sketch: the step was not taken. " + "\n".join(lines))


def _nothing() -> None:
    return
