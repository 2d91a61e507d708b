"""An exchange whose step runs while its caller computes, and of which the caller takes the update a step later."""

from __future__ import annotations

import concurrent.futures
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from hvd_sketch.comm.patience import unhurried
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.log import LOGGER
from hvd_sketch.exchange.update import Part
from hvd_sketch.saved import Form, Maybe


@dataclass
class _Debt:
    """What is owed: a step of this number was started, and nobody has applied its update."""

    step: int | None = None


class Delayed:
    """Lets the steps of an exchange, flat or by hosts, run in a thread of its own: one at a time, arithmetic and all.

    In turn: `Exchange.begin` and `start`; the caller computes; `wait`, after which the exchange is at rest and holds
    the step's update; `settle`, when that is applied. While a step runs nobody else touches the exchange, and its
    communicator is used by nobody else, see `Communicator.apart`. What the step raises, `wait` raises.

    When the process ends, a step that runs is let come to its end, which the other ranks wait for; rank 0 logs that
    its update was not applied.

    Args:
        exchange: what runs.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hvd_sketch exchange")
        self._running: Future[None] | None = None
        self._debt = _Debt()
        weakref.finalize(self, _tell_end, self._debt, exchange.comm.rank)

    @property
    def pending(self) -> bool:
        """Whether a step was started whose update is not applied: it runs, or the exchange holds it."""
        return self._debt.step is not None

    def start(self) -> None:
        """Let the step run that has begun."""
        self._debt.step = self._exchange.step
        self._running = self._thread.submit(_complete, self._exchange)

    def wait(self) -> None:
        """Wait until nothing runs.

        Raises:
            RankLostError, RankMismatchError, ConfigurationError: what the step raised, once; it is given up then.
        """
        if self._running is None:
            return
        concurrent.futures.wait([self._running])
        error, self._running = self._running.exception(), None
        if error is not None:
            error.add_note(f"hvd_sketch: in the exchange of step {self._debt.step}, which ran beside computing")
            self.settle()
            raise error

    def settle(self) -> None:
        """What is held is applied, or given up: the exchange holds an update of zero from now on."""
        self._debt.step = None
        self._exchange.void = False
        self._leave_alone(())
        total = self._exchange.layout.total
        self._exchange.hold(Part(slice(0, total), self._exchange.gradient.new_zeros(1).expand(total)))

    def abandon(self) -> None:
        """Wait until nothing runs, and give up what came of it, were it an error."""
        if self._running is not None:
            concurrent.futures.wait([self._running])
            self._running = None
        self.settle()

    def state_dict(self) -> dict[str, Any]:
        """The update that is held, the same on all ranks; nothing may run."""
        exchange, slots = self._exchange, self._exchange.layout.slots
        if not self.pending or exchange.void:
            return {"update": None, "absent": None}
        absent = torch.zeros(len(slots), dtype=torch.bool, device="cpu")
        absent[list(exchange.absent)] = True
        return {"update": exchange.update.clone(), "absent": absent}

    def state_form(self) -> Form:
        """An update, and which slots it leaves alone."""
        exchange = self._exchange
        absent = torch.zeros(len(exchange.layout.slots), dtype=torch.bool, device="cpu")
        return {"update": Maybe(exchange.gradient), "absent": Maybe(absent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what `state_dict` returned, of the form `state_form`, in place of what is held; nothing may run."""
        self.settle()
        if state["update"] is not None:
            self._exchange.update.copy_(state["update"])
            self._leave_alone(state["absent"].nonzero().flatten().tolist())
            self._debt.step = self._exchange.step

    def _leave_alone(self, absent: Iterable[int]) -> None:
        """The update that is held is of all slots but these."""
        self._exchange._absent.positions = tuple(absent)


def _complete(exchange: Exchange) -> None:
    """The thread's part of a step; gradients are not tracked in it, whatever its caller does."""
    with unhurried(), torch.no_grad():
        exchange.complete()


def _tell_end(debt: _Debt, rank: int) -> None:
    if debt.step is not None and rank == 0:
        LOGGER.warning(
            "hvd_sketch: the end with the gradient of step %d in flight, which the model does not have; call "
            "optimizer.finish() on all ranks after the last step",
            debt.step,
        )
