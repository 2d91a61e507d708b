"""What a rule is: it decides what a push does to the server's model, and who waits for whom."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.server.validation import Served
from hvd_sketch.saved import Form


class Push(NamedTuple):
    """What one worker sent.

    Attributes:
        worker: its rank.
        update: u, how far it went, as a gradient points: the model it began at less the one it
            arrived at. None when there is nothing to apply: values not finite, or a damaged message.
        staleness: changes of the server's model since the one that it began at.
        base: the model that it began at, where the rule asks for it.
        seconds: between the server's answer and this push.
    """

    worker: int
    update: Tensor | None
    staleness: int = 0
    base: Tensor | None = None
    seconds: float = 0.0

    @property
    def change(self) -> Tensor:
        """The update of a push that has one."""
        assert self.update is not None
        return self.update


class Rule(ABC):
    """One algorithm of a server.

    As it stands, every push is applied when it arrives and answered at once. Vectors are flat, in
    host memory, all of the model's dtype (float32 or float64).
    """

    needs_base: ClassVar[bool] = False
    """Whether a push must come with the model that it began at; the server then keeps one for every worker."""

    tells: bool = False
    """Whether workers learn if their push was accepted."""

    def start(self, served: Served) -> None:
        """Learn what is served, before the first push.

        Raises:
            ConfigurationError: when the rule cannot work with so many workers.
        """
        self._served = served

    def turn(self, waiting: Mapping[int, Push], present: AbstractSet[int]) -> list[int] | None:
        """Whose pushes are to be applied now, of those that wait; None when nothing is to be done yet."""
        return list(waiting) or None

    @abstractmethod
    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        """Change ``model`` in place by the pushes of one turn, each with an update; which of them counted.

        The pushes' vectors are used again afterwards.
        """

    def answers(self, workers: Sequence[int], present: AbstractSet[int]) -> Sequence[int]:
        """Who gets the model after a turn of ``workers``; the others wait."""
        return workers

    def enter(self, worker: int, *, fresh: bool) -> None:
        """A worker has come, or come back; ``fresh``: with an empty state of its own."""
        return

    def leave(self, worker: int, *, lost: bool) -> None:
        """A worker has done its part, or is lost."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Copies: tensors, numbers and strings only."""
        return {}

    def state_form(self) -> dict[str, Form]:
        """What a state that can be loaded here looks like, after `start`; see `hvd_sketch.saved`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after `start`."""
        return


class Gathered(Rule):
    """A synchronous rule: the pushes of all workers that are there make one change."""

    least: int = 1
    """Pushes without which a round is void."""

    def start(self, served: Served) -> None:
        super().start(served)
        if len(served.workers) < self.least:
            raise ConfigurationError(
                f"{type(self).__name__} needs at least {self.least} workers, there are {len(served.workers)}; "
                "use more, or let it tolerate fewer that are hostile"
            )

    def turn(self, waiting: Mapping[int, Push], present: AbstractSet[int]) -> list[int] | None:
        return sorted(waiting) if waiting and present <= waiting.keys() else None

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        if len(pushes) < self.least:
            return [False] * len(pushes)
        return self._combine(model, pushes)

    @abstractmethod
    def _combine(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        """`apply` to at least ``least`` pushes, in the order of ranks."""


def above_0(value: float) -> tuple[bool, str, object]:
    """A condition for `check`."""
    return 0.0 < value < math.inf, "above 0 and finite", value


def at_least_0(value: float) -> tuple[bool, str, object]:
    """A condition for `check`."""
    return 0.0 <= value < math.inf, "at least 0 and finite", value


def finite(value: float) -> tuple[bool, str, object]:
    """A condition for `check`."""
    return math.isfinite(value), "finite", value


def loss(value: object) -> tuple[bool, str, object]:
    """A condition for `check`, of a `Validate`."""
    return callable(value), "a function of a model and a number that returns a loss", value


def check(rule: str, **conditions: tuple[bool, str, object]) -> None:
    """Refuse arguments that do not hold, given by name as (holds, what must be, value).

    Raises:
        ConfigurationError: names the rule, the argument and what it must be.
    """
    for name, (holds, demand, value) in conditions.items():
        if not holds:
            raise ConfigurationError(f"{rule}: {name} must be {demand}, got {value!r}")
