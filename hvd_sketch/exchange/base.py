"""One step: local gradients in, the same update out on every rank, nothing lost in between."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.exchange.absent import Absent, gather_absent
from hvd_sketch.exchange.intake import Factor, Finite, Intake
from hvd_sketch.exchange.log import Log
from hvd_sketch.exchange.progress import Saved
from hvd_sketch.exchange.resync import take_over_parameters
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.exchange.update import Part, Update
from hvd_sketch.exchange.void import tell_void
from hvd_sketch.gpu import refuse_capture


class Observer(Saved, Protocol):
    """Learns from every step of an exchange that counts, on all ranks in the same order; may communicate."""

    def observe(self, exchange: Exchange) -> None: ...


class Exchange(Intake):
    """Collects a step's gradients, see `Intake`, runs the collectives, and holds the resulting update.

    `submit` each gradient as it becomes ready, in any order; then `run` once, on all ranks;
    then read `update_of`. A parameter that was not submitted counts as gradient zero. The
    update is the mean over the ranks (the sum with ``average=False``) of what was sent.

    When any rank's gradient holds a NaN or an infinity, the step is void: the update is NaN everywhere
    on all ranks, and memory, step number and schedules are as they were. A parameter that no rank has
    a gradient for is left alone: its update is zero, and what is kept of it stays.

    An algorithm is a subclass with one method, `send`, which is given the step's plan. A step
    without a plan, and a flush, send everything in one dense message.

    Attributes:
        void: whether the last step was.
        observers: who learns from every step that counts.
        log: what rank 0 tells of it.
        shares_memory: whether what other ranks have not sent is in this rank's memory as well.
        frozen: positions of the parameters that do not require a gradient for now.
        only_decay: positions of those that were handed in for their weight decay, and have no gradient.
    """

    shares_memory = False
    _dense_dtype = torch.float32

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.void = False
        self.log = Log(setting.label)
        self.observers: list[Observer] = []
        self.frozen: Collection[int] = ()
        self.only_decay: Collection[int] = ()
        self._update = Update(setting.layout, setting.device, self.domain)
        self._everything: Tensor | None = None
        self._absent, self._missing = Absent(setting.layout), set[int]()
        self.rounds.on_incomplete = self._leave_alone
        self._told_void = False
        self._measured: tuple[Factor, Finite] | None = None

    def run_void(self) -> None:
        """Go through the step as if this rank's gradient were not finite: it is void on all ranks."""
        self.run_measured(1.0, False)

    def run_measured(self, clip: Factor, finite: Finite) -> None:
        """`run`, with what `measure` would say of the gradient."""
        self._measured = clip, finite
        try:
            self.run()
        finally:
            self._measured = None

    def run(self) -> None:
        """Exchange the step's gradients, `begin` and `complete` in one; afterwards `update` is the same on all ranks.

        Raises:
            RankMismatchError: alike on all ranks, when they differ in settings, parameters, the last update or
                the optimizer's numbers, and the memory is then as before the step; or in what they selected,
                and the memory then holds the step's gradient too, unsent.
            ConfigurationError: alike on all ranks, when any of them called `fail_together`; or while the caller
                captures a CUDA graph.
        """
        self.begin()
        self.complete()

    def begin(self) -> None:
        """What comes before a step's messages, and looks at what is the caller's: schedule, parameters, optimizer.

        Nothing is held then, what is missing is known, and the ranks agree on what they train.
        """
        refuse_capture(self.gradient.device)
        self._update.hold()
        self._absent.clear()
        self.comm.occupation = f"step {self.step}"
        self._missing = {*self.staging.close(), *self.only_decay}
        self.rounds.incomplete = bool(self._missing or self.frozen)
        if not self.agreed:
            with self.stats.counting(self.comm):
                self._told_void = False
                self._agree()
                self.comm.look_at_links()
            self.log.begin_step(self.stats)
        if self.comm.size > 1:
            self.rounds.digest = self.drift.lanes(self.step, self.own_state(), self.sizes(), self.gradient.device)

    def complete(self) -> None:
        """The step that was begun; it may run in another thread, while the caller leaves the exchange alone."""
        with self.stats.counting(self.comm):
            clip, finite = self._measured or self.measure()
            self.stats.clip, compressed = clip, self.plan is not None
            self.void = not self._send(clip, finite)
            if self.void:
                self._make_void()
        compressed = compressed and not self.void and not self.rounds.flushes
        self._plans.clear()
        self._count()
        if self._absent.positions and not self.void:
            self._absent.put_back(self.memory, self.update)
        if self.rounds.all_present and not self.void:
            self._note_step()
        self.log.end_step(self, compressed=compressed)

    @property
    def absent(self) -> tuple[int, ...]:
        """The positions of the slots that the last step left alone, because no rank had a gradient."""
        return self._absent.positions

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

    def leave_alone(self, positions: Iterable[int]) -> None:
        """Set these slots and what is kept of them aside for the rest of the step."""
        self._absent.set_aside(positions, self.memory)

    def follow_memory(self) -> None:
        """To be called by who reads ``memory`` after steps; it holds the whole model's then."""
        return

    def hold(self, *parts: Part) -> None:
        """Take these as the step's update, in place of writing it to `update`; together they are all of it."""
        self._update.hold(*parts)

    @property
    def divisor(self) -> float:
        """What a sum over the ranks is divided by to be the update."""
        return float(self.comm.size) if self.average else 1.0

    def average_memory(self) -> None:
        """Replace every rank's residual by the mean over the ranks: what is kept in total stays the same."""
        self.rounds.sum_values(self.memory.residual, "memory")
        self.memory.residual.div_(self.comm.size)

    def fail_together(self, problem: str) -> None:
        """Make the coming `run` raise `ConfigurationError` on all ranks, with every rank's problem."""
        self.rounds.fail_together(problem)

    @property
    def update(self) -> Tensor:
        """The update of the last `run`, of the model, in the layout's order; valid until the next one."""
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

    def unsent(self) -> Tensor:
        """A vector of which the mean over the ranks is that of all that has not been sent."""
        return self.memory.residual

    def flush(self) -> None:
        """Send everything in the next step; a checkpoint after it fits any number of ranks.

        All ranks flush when any of them asks for it.
        """
        self.rounds.ask_to_flush()

    def reset(self) -> None:
        """Forget the memory, and the gradients handed in since the last `run`."""
        self.memory.reset()
        self.staging.forget()
        self.rounds.fail_together(None)
        self._refused, self._loaded_at = False, None

    def _note_step(self) -> None:
        """A step of all ranks was taken."""
        self.step += 1
        if self.comm.size > 1:
            self.drift.note_update(*self._update.contents())
            if self.resync_every and self.step % self.resync_every == 0:
                self.stats.drift = take_over_parameters(self.rounds, self.drift.parameters)
        for observer in self.observers:
            observer.observe(self)

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
        """The whole computed vector in one allreduce, under a header."""
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
        values = message[wire.HEADER :].to(torch.float32).mul_(1.0 / self.divisor)
        self.hold(Part(slice(0, self.layout.total), values))
        self.stats.captured_energy = 1.0
        return True

    def _leave_alone(self) -> None:
        """Find out what no rank has a gradient for, and set it aside."""
        self.leave_alone(gather_absent(self.rounds, self.layout, self._missing, self.frozen))

    def _count(self) -> None:
        """A step is done."""
        self.stats.steps += 1
        self.stats.skipped += self.void
        self.stats.dense_bytes += self.comm.allreduce_bytes(4 * self.layout.total)

    def _make_void(self) -> None:
        """Nothing has changed; say so, once a run."""
        self.update.fill_(math.nan)
        if not self._told_void:
            tell_void(self.rounds, self.layout, self.gradient, self.step)
            self._told_void = True
