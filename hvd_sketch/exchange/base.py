"""One step: local gradients in, the same update out on every rank, nothing lost in between."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.agreement import agree
from hvd_sketch.exchange.staging import Staging
from hvd_sketch.exchange.update import Update
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Memory, Momentum
from hvd_sketch.scope import next_scope
from hvd_sketch.stats import Stats


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

    Args:
        layout: which coordinates belong to which parameter.
        comm: the ranks to exchange with; its size may change between steps.
        settings: text that must be equal on all ranks, checked in the first step.
        average: mean over ranks, or sum.
        clip_norm: multiply a gradient of larger local norm down to it, before the memory.
        momentum: momentum correction, or none.
        device: where gradients, memory and update live.

    Attributes:
        describe_values: a digest of the parameters' values for ranks to compare in the first step;
            set by who knows them.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        settings: str,
        *,
        average: bool,
        clip_norm: float | None,
        momentum: Momentum | None,
        device: torch.device,
    ) -> None:
        self.layout, self.comm, self.average = layout, comm, average
        self.stats = Stats()
        self.step = 0
        self.observers: list[Observer] = []
        self.describe_values: Callable[[], str] = str
        self._staging = Staging(layout, device)
        self.gradient = self._staging.vector
        self._update = Update(layout, device)
        self.memory = Memory(layout.total, device, momentum)
        self._settings, self._clip_norm, self._momentum = settings, clip_norm, momentum
        self._scope: str | None = None
        self._agreed_size = 0
        self._flush_next = self._flush_now = False
        self._all_present = True
        self._problem: str | None = None
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
        self._staging.put(position, gradient, factor, parameter, weight_decay)

    def submit_all(self, vector: Tensor) -> None:
        """Hand in the whole vector, in the layout's order, in place of one `submit` a slot."""
        self._staging.put_all(vector)

    def run(self) -> None:
        """Exchange the step's gradients; afterwards `update` is the same on all ranks.

        Raises:
            RankMismatchError: alike on all ranks, when they differ in settings or parameters, and
                the memory is then as before the step; or in what they selected, and the memory
                then holds the step's gradient too, unsent.
            ConfigurationError: alike on all ranks, when any of them called `fail_together`.
        """
        self._update.hold()
        with self._counted():
            self._staging.close()
            if self._agreed_size != self.comm.size:
                self._agree()
            norm = self._gradient_norm()
            self.stats.clip = self._clip_factor(norm)
            if not self._send(self.stats.clip, math.isfinite(norm)):
                self.update.fill_(math.nan)
                self.stats.skipped += 1
        self.step += self._all_present
        self.stats.steps += 1
        self.stats.dense_bytes += self.comm.allreduce_bytes(4 * self.layout.total)
        for observer in self.observers:
            observer.observe(self)

    def agree_on(self, settings: str) -> None:
        """Add to what must be equal on all ranks, before the first step."""
        self._settings += f" {settings}"

    def average_memory(self) -> None:
        """Replace every rank's residual by the mean over the ranks: what is kept in total stays the same."""
        self.sum_over_ranks(self.memory.residual, "memory")
        self.memory.residual.div_(self.comm.size)

    def sum_over_ranks(self, values: Tensor, what: str) -> None:
        """Collective: replace ``values`` by their sum over the ranks, between two steps."""
        with self._counted(), self.stats.phase("exchange"):
            self.comm.allreduce(values, self._name(what))

    def fail_together(self, problem: str) -> None:
        """Make the coming `run` raise `ConfigurationError` on all ranks, with every rank's problem."""
        self._problem = self._problem or problem

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
        self._flush_next = True

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory and counters: tensors, numbers and strings only."""
        return {
            "rank": self.comm.rank,
            "size": self.comm.size,
            "step": self.step,
            "layout": self.layout.fingerprint(),
            "memory": self.memory.state_dict(),
            "observers": [observer.state_dict() for observer in self.observers],
            **self._extra_state(),
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

    def reset(self) -> None:
        """Forget the memory, and the gradients handed in since the last `run`."""
        self.memory.reset()
        self._staging.forget()
        self._problem = None

    @abstractmethod
    def _send_selected(self, clip: float, finite: bool) -> bool:
        """Make the update and advance the memory; False, and nothing changed, when `_sum` says so."""

    def _is_dense_step(self) -> bool:
        return False

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _send(self, clip: float, finite: bool) -> bool:
        """What the step asks for; False if some rank is not finite."""
        if not self._is_dense_step():
            self._everything = None
            if self._send_selected(clip, finite):
                return True
            if not self._flush_now:
                return False
        return self._send_everything(clip, finite)

    def _send_everything(self, clip: float, finite: bool, dtype: torch.dtype = torch.float32) -> bool:
        """The whole computed vector in one allreduce of ``total + 4`` values."""
        if self._everything is None:
            self._everything = torch.empty(wire.HEADER + self.layout.total, dtype=dtype, device=self.gradient.device)
        message = self._everything
        message[wire.HEADER :].copy_(self.memory.computed(self.gradient, clip, slice(None)))
        if not self._sum(message, finite, "everything") and not self._flush_now:
            return False
        self._flush_next = False
        self.memory.absorb(self.gradient, clip)
        self.memory.keep(slice(0, self.layout.compressed), 0.0, mask=True)
        self.memory.keep(slice(self.layout.compressed, None), 0.0, mask=False)
        self.update.copy_(message[wire.HEADER :]).mul_(1.0 / self._mean_divisor())
        self.stats.captured_energy = 1.0
        return True

    def _sum(self, message: Tensor, finite: bool, name: str) -> bool:
        """Allreduce the first message of a step; False if some rank is not finite or wants to flush."""
        with self.stats.phase("exchange"):
            self._start_sum(message, finite, name).wait()
        return self._heed(wire.read_header(message))

    def _start_sum(self, message: Tensor, finite: bool, name: str) -> Pending:
        """Begin to sum a message of the step over the ranks, under its header."""
        wire.write_header(message, finite, self._problem is not None, self._flush_next)
        return self.comm.start_allreduce(message, self._name(name))

    def _heed(self, header: wire.Header) -> bool:
        """Whether the step that a header speaks for is to be taken; raise when some rank has a problem."""
        if header.problem:
            problems = self.comm.allgather_object(self._problem, self._name("problems"))
            self._problem = None
            lines = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
            raise ConfigurationError("hvd_sketch: the step was not taken. " + "\n".join(lines))
        self._all_present = header.present == self.comm.size
        self._flush_now = header.finite and header.flush
        return header.finite and not header.flush

    def _gradient_norm(self) -> float:
        return self._staging.norm()

    def _clip_factor(self, norm: float) -> float:
        if self._clip_norm is None or not math.isfinite(norm) or norm == 0.0:
            return 1.0
        return min(1.0, self._clip_norm / norm)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the bytes sent inside as this exchange's."""
        before = self.comm.bytes_sent
        yield
        self.stats.bytes_sent += self.comm.bytes_sent - before

    def _name(self, what: str) -> str:
        """The name of one of this exchange's collectives, from the first run on."""
        if self._scope is None:
            self._scope = next_scope(self.comm.group)
        return f"{self._scope}.{what}"

    def _mean_divisor(self) -> float:
        return float(self.comm.size) if self.average else 1.0

    def _agree(self) -> None:
        """Compare settings, parameters and their values; on a difference, tell every rank what differs."""
        mine = {
            "settings": f"{self._settings} average={self.average} momentum_correction={self._momentum}",
            "step": str(self.step),
            "parameters": self.layout.describe(),
            "compressed": str(self.layout.compressed),
            "values": self.describe_values(),
        }
        self._agreed_size = self.comm.size if agree(self.comm, mine, self._name) == self.comm.size else 0
