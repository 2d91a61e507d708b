"""Parameters that no rank has a gradient for: a step leaves them and what is kept of them alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from hvd_sketch.comm.copies import majority, thrice
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.rounds import Rounds
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Memory


class Absent:
    """What is kept of some parameters, set aside during a step, so that none of it is chosen or sent.

    Attributes:
        positions: of their slots; none between the steps that set something aside.
    """

    def __init__(self, layout: Layout) -> None:
        self._slots = layout.slots
        self.positions: tuple[int, ...] = ()
        self._kept: list[list[Tensor]] = []

    def clear(self) -> None:
        """A step begins, with nothing set aside."""
        self.positions = ()

    def set_aside(self, positions: Iterable[int], memory: Memory) -> None:
        """Take what the memory has of these slots out of it."""
        self.positions = tuple(positions)
        self._kept = [[part.clone() for part in self._parts(position, memory)] for position in self.positions]
        for position in self.positions:
            for part in self._parts(position, memory):
                part.zero_()

    def put_back(self, memory: Memory, update: Tensor) -> None:
        """Undo that, and whatever the step did to these slots."""
        for position, kept in zip(self.positions, self._kept, strict=True):
            torch._foreach_copy_(self._parts(position, memory), kept)
            update[self._slots[position].offset : self._slots[position].stop] = 0.0
        self._kept = []

    def _parts(self, position: int, memory: Memory) -> list[Tensor]:
        slot = self._slots[position]
        vectors = [memory.residual] if memory.velocity is None else [memory.residual, memory.velocity]
        return [vector[slot.offset : slot.stop] for vector in vectors]


def gather_absent(rounds: Rounds, layout: Layout, missing: Collection[int], frozen: Collection[int]) -> list[int]:
    """Collective: the positions of the slots that no rank has a gradient for; six floats a slot.

    Args:
        rounds: the collectives.
        layout: the slots.
        missing: those without a gradient on this rank.
        frozen: those that do not require one.

    Raises:
        ConfigurationError: alike on all ranks, when a parameter is frozen on some of them only.
    """
    count = len(layout.slots)
    lanes = torch.zeros(2, count + 1, dtype=torch.float32, device="cpu")
    lanes[0] = 1.0  # the last one counts the ranks: one that has joined is not among them
    lanes[0, list(missing)] = 0.0
    lanes[1, list(frozen)] = 1.0
    message = thrice(lanes.view(-1))
    rounds.comm.allreduce(message, rounds.name_of("present"))
    told = majority(message.tolist())
    having, ranks, freezing = told[:count], told[count], told[count + 1 : -1]
    for slot, some, without in zip(layout.slots, having, freezing, strict=True):
        if some and 0 < without < ranks:
            raise ConfigurationError(
                f"hvd_sketch: the step was not taken: parameter {slot.name!r} is frozen (requires_grad=False) on "
                f"{without:.0f} of the {ranks:.0f} ranks; freeze it on all ranks or on none"
            )
    return [position for position, some in enumerate(having) if not some]
