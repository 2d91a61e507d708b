"""One step: local gradients in, the same update out on every rank, nothing lost in between."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.states import broadcast_state
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.absent import Absent, gather_absent
from hvd_sketch.exchange.agreement import Answers, agree, newcomers
from hvd_sketch.exchange.rounds import Rounds
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.exchange.staging import Staging
from hvd_sketch.exchange.update import Part, Update
from hvd_sketch.exchange.void import tell_void
from hvd_sketch.memory import Memory
from hvd_sketch.saved import Equal, Form, unfit
from hvd_sketch.stats import Stats

Factor = float | Tensor
Finite = bool | Tensor


_NOT_BEGUN = "not-begun"


class Observer(Protocol):
    """Learns from every step of an exchange, on all ranks in the same order; may communicate."""

    def observe(self, exchange: Exchange) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def state_form(self) -> Form: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Exchange(ABC):
    """Collects a step's gradients, runs the collectives, and holds the resulting update.

    `submit` each gradient as it becomes ready, in any order; then `run` once, on all ranks;
    then read `update_of`. A parameter that was not submitted counts as gradient zero. The
    update is the mean over the ranks (the sum with ``average=False``) of what was sent.

    When any rank's gradient holds a NaN or an infinity, the step is void: the update is NaN everywhere
    on all ranks, and memory, step number and observers are as they were. A parameter that no rank has
    a gradient for is left alone: its update is zero, and what is kept of it stays.

    An algorithm is a subclass with one method, `send`, which is given the step's plan. A step
    without a plan, and a flush, send everything in one dense message.

    Attributes:
        layout, comm, average: as in the `Setting`.
        stats: what it cost.
        step: number of the coming step; void ones and those that not all ranks took part in do not count.
        void: whether the last step was.
        observers: who learns from every step.
        describe_values: a digest of the parameters' values for ranks to compare in the first step;
            set by who knows them.
        gradient: the step's gradients, float32, of the layout's size.
        memory: what was not sent.
        rounds: the collectives.
        frozen: positions of the parameters that do not require a gradient for now.
        only_decay: positions of those that were handed in for their weight decay, and have no gradient.
        staging: which gradients have arrived, and their norms.
    """

    _dense_dtype = torch.float32

    def __init__(self, setting: Setting) -> None:
        self.layout, self.comm, self.average = setting.layout, setting.comm, setting.average
        self.stats = Stats()
        self.step, self.void = 0, False
        self.observers: list[Observer] = []
        self.describe_values: Callable[[], str] = str
        self.staging = Staging(setting.layout, setting.device)
        self.gradient = self.staging.vector
        self.memory = Memory(setting.layout.total, setting.device, setting.momentum)
        self.rounds = Rounds(setting.comm, self.stats)
        self._setting, self._agreed = setting, setting.name
        self._agreed_size, self._loaded, self._refused = 0, False, False
        self._update = Update(setting.layout, setting.device)
        self._plans: list[Any] = []
        self._everything: Tensor | None = None
        self._absent, self._missing = Absent(setting.layout), set[int]()
        self.frozen: Collection[int] = ()
        self.only_decay: Collection[int] = ()
        self.rounds.on_incomplete = self._leave_alone
        self._told_void = self._forced_void = False

    def submit(
        self,
        position: int,
        gradient: Tensor,
        factor: float = 1.0,
        parameter: Tensor | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """Hand in ``factor * gradient + weight_decay * parameter`` (dense) of slot ``position``."""
        self.staging.put(position, gradient, factor, parameter, weight_decay)

    def submit_many(self, gradients: Mapping[int, Tensor], factor: float = 1.0) -> None:
        """Hand in ``factor`` times the gradients of some slots, by their positions, at the cost of one on a GPU."""
        self.staging.put_many(gradients, factor)

    @property
    def streams(self) -> bool:
        """Whether gradients are better handed in as they become ready, because messages begin before `run`."""
        return False

    def has_begun(self, position: int) -> bool:
        """Whether some of a slot's gradient is under way."""
        return False

    def take_back(self, position: int) -> None:
        """Undo a `submit` of this step, of a slot that has not begun."""
        self.staging.take_back(position)

    def run_void(self) -> None:
        """Go through the step as if this rank's gradient were not finite: it is void on all ranks."""
        self._forced_void = True
        try:
            self.run()
        finally:
            self._forced_void = False

    def snapshot(self) -> Callable[[], None]:
        """Remember memory and counters; what is returned goes back to them, once."""
        state = self.state_dict()
        return partial(self._restore, state)

    def _restore(self, state: dict[str, Any]) -> None:
        agreed = self._agreed_size
        self.load_state_dict(state)
        self._agreed_size = agreed

    def submit_all(self, vector: Tensor) -> None:
        """Hand in the whole vector, in the layout's order, in place of one `submit` a slot."""
        self.staging.put_all(vector)

    def run(self) -> None:
        """Exchange the step's gradients; afterwards `update` is the same on all ranks.

        Raises:
            RankMismatchError: alike on all ranks, when they differ in settings or parameters, and
                the memory is then as before the step; or in what they selected, and the memory
                then holds the step's gradient too, unsent.
            ConfigurationError: alike on all ranks, when any of them called `fail_together`.
        """
        self._update.hold()
        self._absent.clear()
        with self.stats.counting(self.comm):
            self._missing = {*self.staging.close(), *self.only_decay}
            self.rounds.incomplete = bool(self._missing or self.frozen)
            if not self.agreed:
                self._agree()
            clip, finite = (1.0, False) if self._forced_void else self.measure()
            self.stats.clip = clip
            self.void = not self._send(clip, finite)
            if self.void:
                self._make_void()
        self._plans.clear()
        self.stats.steps += 1
        self.stats.dense_bytes += self.comm.allreduce_bytes(4 * self.layout.total)
        if self._absent.positions and not self.void:
            self._absent.put_back(self.memory, self.update)
        self.step += self.rounds.all_present
        for observer in self.observers:
            observer.observe(self)

    @property
    def absent(self) -> tuple[int, ...]:
        """The positions of the slots that the last step left alone, because no rank had a gradient."""
        return self._absent.positions

    @property
    def plan(self) -> Any:
        """The sizes of the coming step's messages, None when it sends everything; solved once a step."""
        if not self._plans:
            self._plans.append(self._setting.plan(self.step, self.comm.size))
        return self._plans[0]

    @abstractmethod
    def send(self, plan: Any, clip: Factor, finite: Finite) -> bool:
        """Send what the plan asks for: make the update, and advance the memory.

        Its first message goes through `Rounds.sum`. Where that says False, nothing may have changed.

        Args:
            plan: what the compressor's ``plan`` gave for this step.
            clip: factor of the gradient: a number, or a tensor of one on the gradient's device, which
                the `Memory` takes as well.
            finite: whether this rank's gradient is: a bool, or a tensor of 0 or NaN, for `Rounds.sum`.

        Returns:
            what `Rounds.sum` said.
        """

    def hold(self, *parts: Part) -> None:
        """Take these as the step's update, in place of writing it to `update`; together they are all of it."""
        self._update.hold(*parts)

    @property
    def divisor(self) -> float:
        """What a sum over the ranks is divided by to be the update."""
        return float(self.comm.size) if self.average else 1.0

    def measure(self) -> tuple[Factor, Finite]:
        """The factor of this rank's gradient, and whether it is finite; what a GPU knows stays there."""
        if self.staging.gathered:
            return self.staging.measure(self._setting.clip_norm)
        norm = self.gradient_norm()
        return self.clip_factor(norm), math.isfinite(norm)

    def gradient_norm(self) -> float:
        """The norm of this rank's gradient; not finite if the gradient is not."""
        return self.staging.norm()

    def clip_factor(self, norm: float) -> float:
        """The factor that brings a gradient of this norm down to ``clip_norm``."""
        limit = self._setting.clip_norm
        if limit is None or not math.isfinite(norm) or norm == 0.0:
            return 1.0
        return min(1.0, limit / norm)

    @property
    def agreed(self) -> bool:
        """Whether the ranks, as many as there are now, have compared what they train."""
        return self._agreed_size == self.comm.size

    def agree_on(self, settings: str) -> None:
        """Add to what must be equal on all ranks, before the first step."""
        self._agreed += f" {settings}"

    def average_memory(self) -> None:
        """Replace every rank's residual by the mean over the ranks: what is kept in total stays the same."""
        self.rounds.sum_values(self.memory.residual, "memory")
        self.memory.residual.div_(self.comm.size)

    def fail_together(self, problem: str) -> None:
        """Make the coming `run` raise `ConfigurationError` on all ranks, with every rank's problem."""
        self.rounds.fail_together(problem)

    @property
    def update(self) -> Tensor:
        """The update of the last `run`, in the layout's order; valid until the next one."""
        return self._update.whole()

    def write_update(self, tensors: Mapping[int, Tensor], factor: float = 1.0) -> None:
        """Write the update, times a factor, to tensors of any dtype and strides, by the position of their slot."""
        self._update.write(tensors, factor)

    def update_of(self, position: int) -> Tensor:
        """The update of one slot in its shape: a view, valid until the next `run`."""
        return self._update.of(position)

    @property
    def owned(self) -> slice:
        """Coordinates whose memory here is the sum of what all ranks left out, not this rank's part of it."""
        return slice(0)

    def flush(self) -> None:
        """Send everything in the next step; a checkpoint after it fits any number of ranks.

        All ranks flush when any of them asks for it.
        """
        self.rounds.ask_to_flush()

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

    def _identity(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        return {
            "exchange": type(self).__name__,
            "rank": self.comm.rank,
            "size": self.comm.size,
            "parameters": self.layout.describe(),
            "compressed": self.layout.compressed,
            "cuts": list(self.layout.cuts),
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

    def reset(self) -> None:
        """Forget the memory, and the gradients handed in since the last `run`."""
        self.memory.reset()
        self.staging.forget()
        self.rounds.fail_together(None)
        self._refused = False

    def _send(self, clip: Factor, finite: Finite) -> bool:
        """What the step asks for; False if some rank is not finite."""
        if self.plan is not None:
            self._everything = None
            if self.send(self.plan, clip, finite):
                return True
            if not self.rounds.flushes:
                return False
        return self._send_everything(clip, finite)

    def _send_everything(self, clip: Factor, finite: Finite) -> bool:
        """The whole computed vector in one allreduce of ``total + 4`` values."""
        if self._everything is None:
            size = wire.HEADER + self.layout.total
            self._everything = torch.empty(size, dtype=self._dense_dtype, device=self.gradient.device)
        message = self._everything
        message[wire.HEADER :].copy_(self.memory.computed(self.gradient, clip, slice(None)))
        if not self.rounds.sum(message, finite, "everything") and not self.rounds.flushes:
            return False
        self.rounds.ask_to_flush(False)
        self.memory.absorb(self.gradient, clip)
        self.memory.keep(slice(0, self.layout.compressed), 0.0, mask=True)
        self.memory.keep(slice(self.layout.compressed, None), 0.0, mask=False)
        self.update.copy_(message[wire.HEADER :]).mul_(1.0 / self.divisor)
        self.stats.captured_energy = 1.0
        return True

    def _leave_alone(self) -> None:
        """Find out what no rank has a gradient for, and set it aside."""
        positions = gather_absent(self.rounds, self.layout, self._missing, self.frozen)
        self._absent.set_aside(positions, self.memory)

    def _make_void(self) -> None:
        """Nothing has changed; say so, once a run."""
        self.update.fill_(math.nan)
        self.stats.skipped += 1
        if not self._told_void:
            tell_void(self.rounds, self.layout, self.gradient, self.step)
            self._told_void = True

    def _agree(self) -> None:
        """Compare settings, parameters and their values; on a difference, tell every rank what differs."""
        setting, self._told_void = self._setting, False
        mine = {
            "settings": f"{self._agreed} average={setting.average} momentum_correction={setting.momentum}",
            "step": self._progress(),
            "parameters": self.layout.describe(),
            "compressed": str(self.layout.compressed),
            "values": self.describe_values(),
        }
        contributors = agree(self.comm, mine, self.rounds.name_of, self._welcome)
        self._agreed_size = self.comm.size if contributors == self.comm.size else 0
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
