"""What an exchange carries from one step to the next: saved, loaded, and compared between the ranks."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from hvd_sketch import native
from hvd_sketch.comm.states import broadcast_state
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.agreement import Answers, agree, newcomers
from hvd_sketch.exchange.drift import Drift, Groups
from hvd_sketch.exchange.rounds import Rounds
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.layout import describe_values
from hvd_sketch.memory import Memory
from hvd_sketch.saved import Equal, Form, unfit
from hvd_sketch.sketch import geometry
from hvd_sketch.sparse import codec
from hvd_sketch.stats import Stats
from hvd_sketch.version import VERSION

_NOT_BEGUN = "not-begun"


class Undo(Protocol):
    """Goes back to what a `Progress` was; given positions of slots, to what was kept of these alone."""

    def __call__(self, positions: Iterable[int] | None = None) -> None: ...


class Saved(Protocol):
    """Has a state that is saved with the exchange, the same on all ranks."""

    def state_dict(self) -> dict[str, Any]: ...

    def state_form(self) -> Form: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Progress(ABC):
    """The lasting part of an `hvd_sketch.exchange.base.Exchange`: this rank's memory, and what is common to all ranks.

    Common are the number of the step, the observers' states, and what an algorithm keeps in `own_state`.

    Attributes:
        layout, comm, average: as in the `Setting`.
        stats: what it cost.
        step: number of the coming step; those that not all ranks took part in do not count.
        observers: whose states are saved with it.
        drift: whether the ranks still hold the same; whoever knows the parameters tells it, see `watch`.
        memory: what was not sent.
        rounds: the collectives.
    """

    observers: Sequence[Saved]

    def __init__(self, setting: Setting) -> None:
        self.layout, self.comm, self.average = setting.layout, setting.comm, setting.average
        self.stats = Stats()
        self.step = 0
        self.drift = Drift(setting.layout)
        self.memory = Memory(setting.layout.total, setting.device, setting.momentum)
        self.rounds = Rounds(setting.comm, self.stats, self.drift)
        self._setting, self._agreed = setting, setting.name
        self._agreed_size, self._loaded, self._refused = 0, False, False
        self._resync_every = self._ranks = 0
        self._loaded_at: int | None = None
        self._plans: list[Any] = []

    @property
    def is_as_loaded(self) -> bool:
        """Whether a saved memory was loaded, and no step was taken since."""
        return self._loaded_at == self.stats.steps

    @property
    def plan(self) -> Any:
        """The sizes of the coming step's messages, None when it sends everything; solved once a step."""
        if not self._plans:
            self._plans.append(self._setting.plan(self.step, self.comm.size))
        return self._plans[0]

    def plan_at(self, step: int) -> Any:
        """The sizes of a step's messages, solved now.

        Raises:
            ConfigurationError: alike on all ranks, where there are none.
        """
        return self._setting.plan(step, self.comm.size)

    def sizes(self) -> str:
        """The coming step's plan as text that all ranks compare."""
        return repr(self.plan)

    @property
    def agreed(self) -> bool:
        """Whether the ranks, as many as there are now, have compared what they train."""
        return self._agreed_size == self.comm.size

    def agree_on(self, settings: str) -> None:
        """Add to what must be equal on all ranks, before the first step."""
        self._agreed += f" {settings}"

    def watch(self, parameters: Mapping[str, Tensor], groups: Callable[[], Groups]) -> None:
        """Compare between the ranks, in every step, these parameters and the numbers of an optimizer's groups."""
        self.drift.parameters = [parameters[slot.name] for slot in self.layout.slots]
        self.drift.groups = groups
        self.drift.describe_values = partial(describe_values, parameters)

    @property
    def resync_every(self) -> int:
        """All ranks take over rank 0's parameters in every so manieth step, and do not compare them; 0 for never.

        To be set before the first step, alike on all ranks.
        """
        return self._resync_every

    @resync_every.setter
    def resync_every(self, steps: int) -> None:
        if steps < 0:
            raise ConfigurationError(f"resync_every must be at least 0, got {steps}")
        if steps and not self.drift.parameters:
            raise ConfigurationError(
                "resync_every: a DistributedDataParallel hook must not change parameters while backward runs; use "
                "hvd_sketch.DistributedOptimizer, or broadcast them between two steps"
            )
        self._resync_every, self.drift.samples = steps, steps == 0
        self._agreed_size = 0

    def snapshot(self) -> Undo:
        """Remember memory, counters and a flush that is asked for; `Undo` goes back as often as it is called."""
        memory, common = self.memory.state_dict(), copy.deepcopy(self._common_state())
        agreed, flush = (self._agreed_size, self._loaded, self._refused), self.rounds.flush_asked

        def restore(positions: Iterable[int] | None = None) -> None:
            if positions is not None:
                self._restore_slots(memory, positions)
                return
            self.memory.load_state_dict(memory)
            self._load_common_state(copy.deepcopy(common))
            self._agreed_size, self._loaded, self._refused = agreed
            if flush:
                self.rounds.ask_to_flush()

        return restore

    def _restore_slots(self, memory: Mapping[str, Tensor], positions: Iterable[int]) -> None:
        if self.memory.residual.numel() == 0:
            return
        for slot in (self.layout.slots[position] for position in positions):
            where = slice(slot.offset, slot.stop)
            self.memory.part(where).load_state_dict({name: values[where] for name, values in memory.items()})

    def succeed(self, other: Progress) -> None:
        """Take the place of another exchange of this process: its memory, and which ranks it knew.

        Raises:
            ConfigurationError: see `load_state_dict`.
        """
        self.stats.departed, self._ranks = other.stats.departed, other._ranks
        self.load_state_dict(other.state_dict())

    def meet_others(self, name: str) -> None:
        """Collective, when ranks have come or gone: all take over step, schedule and scales of the first one.

        What this rank has not sent stays its own. ``stats.departed`` counts ranks that are not here any more.
        """
        told = self.comm.allgather_object(self._ranks, f"{name}.ranks")
        begun = self._loaded or self.stats.steps > 0
        mine = self._common_state() if self.comm.rank == 0 and begun else None
        common = broadcast_state(self.comm, mine, 0, f"{name}.common")
        if common is not None:
            self._load_common_state(common)
        self.stats.departed += max(told) - sum(ranks > 0 for ranks in told) if self._ranks else 0
        self._ranks, self._agreed_size = self.comm.size, 0
        self.rounds.begin_again()

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory and counters: tensors, numbers and strings only."""
        return {
            **self._identity(),
            "memory": self.memory.state_dict(),
            **self._common_state(),
        }

    def state_form(self) -> Form:
        """What a state that can be loaded here looks like; see `hvd_sketch.saved`."""
        observers = [{"kind": Equal(type(o).__name__), "state": o.state_form()} for o in self.observers]
        return {
            **{name: Equal(value) for name, value in self._identity().items()},
            "cuts": [Equal(cut) for cut in self.layout.cuts],
            "memory": self.memory.state_form(),
            "step": int,
            "observers": observers,
            **self.own_form(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's memory, all of it or nothing.

        Where some ranks have loaded one and others have not begun, the others take over step, schedule and
        scales in the next `run`; their memory is empty.

        Raises:
            ConfigurationError: when the state belongs to another rank, number of ranks, model, algorithm or
                schedule, or is damaged. The next `run` raises on all ranks if others have loaded theirs. Call
                `flush` and do one more step before saving to change the number of ranks.
        """
        problem = unfit(state, self.state_form())
        self._agreed_size, self._refused = 0, problem is not None
        if problem is not None:
            raise ConfigurationError(f"rank {self.comm.rank}: {problem}")
        self.memory.load_state_dict(state["memory"])
        self._load_common_state(state)
        self._loaded_at = self.stats.steps

    def _identity(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        return {
            "exchange": type(self).__name__,
            "rank": self.comm.rank,
            "size": self.comm.size,
            "parameters": self.layout.describe(),
            "compressed": self.layout.compressed,
            "cuts": list(self.layout.cuts),
            **({} if self._setting.mixing is None else {"mixing": self._setting.mixing}),
        }

    def _common_state(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        observers = [{"kind": type(o).__name__, "state": o.state_dict()} for o in self.observers]
        return {"step": self.step, "observers": observers, **self.own_state()}

    def _load_common_state(self, state: dict[str, Any]) -> None:
        for observer, saved in zip(self.observers, state["observers"], strict=True):
            observer.load_state_dict(saved["state"])
        self.step, self._loaded = state["step"], True
        self._agreed_size = 0
        self._plans.clear()
        self.load_own_state(state)

    def own_state(self) -> dict[str, Any]:
        """What an algorithm keeps beside the memory, the same on all ranks: tensors, numbers and strings only."""
        return {}

    def own_form(self) -> Form:
        """What `own_state` looks like; see `hvd_sketch.saved`. Unless told, anything will do that has its names."""
        return dict.fromkeys(self.own_state(), object)

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""
        return

    def _agree(self) -> None:
        """Compare settings, parameters and their values; on a difference, tell every rank what differs."""
        setting = self._setting
        mine = {
            "software": f"version={VERSION} sketch_geometry={geometry.VERSION} sparse_code={codec.VERSION} "
            f"kernel={native.identity()}",
            "settings": f"{self._agreed} average={setting.average} momentum_correction={setting.momentum} "
            f"resync_every={self._resync_every}",
            "step": self._progress(),
            "parameters": self.layout.describe(),
            "compressed": str(self.layout.compressed),
            "values": self.drift.describe_values(),
        }
        contributors = agree(self.comm, mine, self._welcome)
        self.stats.departed += max(0, self._ranks - self.comm.size)
        self._ranks = self.comm.size
        self._agreed_size = self.comm.size if contributors == self.comm.size else 0
        self.drift.forget()
        self.rounds.regular = True  # alike also on ranks that are new
        self._plans.clear()

    def _progress(self) -> str:
        """How far training has come, one word."""
        if self._refused:
            return f"{self.step},saved-memory-refused"
        return f"{self.step}" if self._loaded or self.stats.steps else _NOT_BEGUN

    def _welcome(self, told: Sequence[Answers]) -> bool:
        """Let ranks that have not begun take over what is common from those that have, if nothing else differs."""
        new = newcomers(told, "step", _NOT_BEGUN)
        if not new:
            return False
        root = next(rank for rank in range(self.comm.size) if rank not in new)
        mine = self._common_state() if self.comm.rank == root else None
        common = broadcast_state(self.comm, mine, root, self.rounds.name_of("common"))
        if self.comm.rank in new:
            self._load_common_state(common)
        return True
