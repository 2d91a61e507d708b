"""One step: local gradients in, the same update out on every rank, nothing lost in between."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import gpu, wire
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.agreement import agree
from hvd_sketch.exchange.rounds import Rounds
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.exchange.staging import Staging
from hvd_sketch.exchange.update import Part, Update
from hvd_sketch.memory import Memory
from hvd_sketch.stats import Stats

Factor = float | Tensor
Finite = bool | Tensor


class Observer(Protocol):
    """Learns from every step of an exchange, on all ranks in the same order; may communicate."""

    def observe(self, exchange: Exchange) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Exchange(ABC):
    """Collects a step's gradients, runs the collectives, and holds the resulting update.

    `submit` each gradient as it becomes ready, in any order; then `run` once, on all ranks;
    then read `update_of`. A parameter that was not submitted counts as gradient zero. The
    update is the mean over the ranks (the sum with ``average=False``) of what was sent.

    When any rank's gradient holds a NaN or an infinity, the update is NaN everywhere on all
    ranks, and every memory is as it was before the step: a gradient scaler then skips the step.

    An algorithm is a subclass with one method, `send`, which is given the step's plan. A step
    without a plan, and a flush, send everything in one dense message.

    Attributes:
        layout, comm, average: as in the `Setting`.
        stats: what it cost.
        step: number of the coming step; those that not all ranks took part in do not count.
        observers: who learns from every step.
        describe_values: a digest of the parameters' values for ranks to compare in the first step;
            set by who knows them.
        gradient: the step's gradients, float32, of the layout's size.
        memory: what was not sent.
        rounds: the collectives.
        staging: which gradients have arrived, and their norms.
    """

    _dense_dtype = torch.float32

    def __init__(self, setting: Setting) -> None:
        self.layout, self.comm, self.average = setting.layout, setting.comm, setting.average
        self.stats = Stats()
        self.step = 0
        self.observers: list[Observer] = []
        self.describe_values: Callable[[], str] = str
        self.staging = Staging(setting.layout, setting.device)
        self.gradient = self.staging.vector
        self.memory = Memory(setting.layout.total, setting.device, setting.momentum)
        self.rounds = Rounds(setting.comm, self.stats)
        self._setting, self._agreed = setting, setting.name
        self._agreed_size = 0
        self._update = Update(setting.layout, setting.device)
        self._plans: list[Any] = []
        self._everything: Tensor | None = None

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
    def gathers(self) -> bool:
        """Whether gradients are better handed in together than each as it becomes ready."""
        return gpu.serves(self.gradient)

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
        with self.stats.counting(self.comm):
            self.staging.close()
            if not self.agreed:
                self._agree()
            clip, finite = self.measure()
            self.stats.clip = clip
            if not self._send(clip, finite):
                self.update.fill_(math.nan)
                self.stats.skipped += 1
        self._plans.clear()
        self.step += self.rounds.all_present
        self.stats.steps += 1
        self.stats.dense_bytes += self.comm.allreduce_bytes(4 * self.layout.total)
        for observer in self.observers:
            observer.observe(self)

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
            "rank": self.comm.rank,
            "size": self.comm.size,
            "step": self.step,
            "layout": self.layout.fingerprint(),
            "memory": self.memory.state_dict(),
            "observers": [observer.state_dict() for observer in self.observers],
            **self.own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's memory.

        Raises:
            ConfigurationError: when the state belongs to another rank, number of ranks, or
                model. Call `flush` and do one more step before saving to change the number.
        """
        expected = {"rank": self.comm.rank, "size": self.comm.size, "layout": self.layout.fingerprint()}
        for key, value in expected.items():
            if state[key] != value:
                raise ConfigurationError(
                    f"rank {self.comm.rank}: the saved memory has {key}={state[key]!r}, here it is {value!r}; "
                    "load each rank's own file, or flush() one step before saving and load none"
                )
        if len(state["observers"]) != len(self.observers):
            raise ConfigurationError(
                f"the saved memory is of {len(state['observers'])} adaptive schedules and measuring error feedbacks, "
                f"this optimizer has {len(self.observers)}; use the schedule and error_feedback it was saved with"
            )
        self.memory.load_state_dict(state["memory"])
        for observer, saved in zip(self.observers, state["observers"], strict=True):
            observer.load_state_dict(saved)
        self.step = state["step"]
        self._agreed_size = 0
        self._plans.clear()
        self.load_own_state(state)

    def own_state(self) -> dict[str, Any]:
        """What an algorithm keeps beside the memory: tensors, numbers and strings only."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""
        return

    def reset(self) -> None:
        """Forget the memory, and the gradients handed in since the last `run`."""
        self.memory.reset()
        self.staging.forget()
        self.rounds.fail_together(None)

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

    def _agree(self) -> None:
        """Compare settings, parameters and their values; on a difference, tell every rank what differs."""
        setting = self._setting
        mine = {
            "settings": f"{self._agreed} average={setting.average} momentum_correction={setting.momentum}",
            "step": str(self.step),
            "parameters": self.layout.describe(),
            "compressed": str(self.layout.compressed),
            "values": self.describe_values(),
        }
        self._agreed_size = self.comm.size if agree(self.comm, mine, self.rounds.name_of) == self.comm.size else 0
        self._plans.clear()
