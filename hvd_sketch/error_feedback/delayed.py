"""Anticipation where gradients are one step late: ahead by what is unsent, and by the gradient that is in flight."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from hvd_sketch.error_feedback.ahead import Ahead
from hvd_sketch.error_feedback.anticipate import Anticipate, AnticipatingOptimizer, Anticipation
from hvd_sketch.error_feedback.base import Wrapping
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.common_share import CommonShare
from hvd_sketch.methods.delayed import DelayedOptimizer
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.saved import Maybe, unfit


def wrap_delayed(feedback: Anticipate, wrapping: Wrapping) -> DelayedAnticipatingOptimizer:
    """What `Anticipate.wrap` does, for gradients one step late."""
    shares = CommonShare()

    def ahead_of(optimizer: DelayedAnticipatingOptimizer, flat: FlatParameters) -> DelayedAnticipation:
        return DelayedAnticipation(optimizer, optimizer.its_exchange, flat, shares, feedback.coefficient_of(optimizer))

    return DelayedAnticipatingOptimizer(wrapping, feedback.wiring(wrapping, shares), ahead_of)


class DelayedAnticipatingOptimizer(AnticipatingOptimizer, DelayedOptimizer):
    """A `DelayedOptimizer` whose gradients are taken ahead of the model by everything that it does not have yet."""

    _ahead: DelayedAnticipation

    def finish(self) -> None:
        """Apply what is in flight, at x; see `DelayedOptimizer.finish`."""
        self._passes.finish()
        super().finish()
        if self._wiring.is_active() and self._parts is not None:
            self._ahead.note(self.exchange, in_flight=False)

    def restart(self) -> None:
        """As above; nothing is ahead."""
        super().restart()
        self._ahead.noted.vector.zero_()

    def memory_state_dict(self) -> dict[str, Any]:
        """As above, and what the coming forward is ahead by."""
        return {**super().memory_state_dict(), "ahead": self._ahead.noted.vector.clone()}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it all; of a state without a delay the memory is what is ahead."""
        rest = {name: part for name, part in state.items() if name != "ahead"}
        ahead = state.get("ahead")
        problem = unfit({"ahead": ahead}, {"ahead": Maybe(self._ahead.noted.vector)})
        if problem is not None:
            raise ConfigurationError(f"rank {self.exchange.comm.rank}: {problem}")
        super().load_memory_state_dict(rest)
        if ahead is None:
            self._ahead.note(self.exchange, in_flight=False)
        else:
            self._ahead.noted.vector.copy_(ahead)

    def _note_in_flight(self, exchange: Exchange) -> None:
        self._ahead.note(exchange)


class DelayedAnticipation(Anticipation):
    """Ahead by P of what is unsent and of the gradient in flight, as they were when its exchange began."""

    @cached_property
    def noted(self) -> Flat:
        """a c (e + g) of the model, g clipped by its own norm."""
        return self.flat.new()

    def note(self, exchange: Exchange, *, in_flight: bool = True) -> None:
        """Look at an exchange at rest: at its memory, and at the gradient of a step that has begun.

        Before the first step is through nothing is known of what ranks have in common, and nothing is ahead.
        """
        into = self.noted.vector
        if self._shares.shares is None:
            into.zero_()
            return
        into.copy_(exchange.memory.residual)
        into[exchange.owned] /= exchange.comm.size
        clip, finite = exchange.judge(exchange.gradient_norm())
        if in_flight and finite:
            into.add_(exchange.gradient, alpha=clip)
        exchange.domain.leave(into)
        self._weigh(self.noted)

    def move(self) -> None:
        """On processors alone."""
        Ahead.move(self)

    def _read(self, into: Flat) -> None:
        into.vector.copy_(self.noted.vector)
