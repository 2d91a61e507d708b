"""The server's model, and everything that changes it, without any communication."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.log import Event, Happened, Log
from hvd_sketch.methods.server.message import Header, Kind, Note
from hvd_sketch.methods.server.rules.base import Push, Rule
from hvd_sketch.methods.server.stats import ServerStats, WorkerCounts
from hvd_sketch.methods.server.validation import Served
from hvd_sketch.saved import Form

Replies = list[tuple[int, Tensor]]
"""Messages (uint8), each with the rank that it goes to."""


class ProtocolError(ValueError):
    """What a worker sent cannot be right; nothing was changed."""


class Store:
    """A model x, its version (the number of changes so far), and a rule that decides about the changes.

    Every worker has at most one push under way. It gets one model for it, of after the turn in
    which it counted: all of it, or a code of the difference to what this worker was sent so far. The
    store keeps that for every worker then, as it does where the rule asks for it, and a coder's
    rounding never adds up. What workers say is not trusted.

    Memory: x, and a model for every worker where one is kept. Not for several threads.

    Args:
        model: x, changed in place; finite.
        rule: see `Rule`.
        served: what and to whom.
        up: the code of updates; besides, whole ones are understood.
        down: the code of differences, or None to answer with the whole model.
        log: of everything that changes the state.
    """

    def __init__(
        self,
        model: Tensor,
        rule: Rule,
        served: Served,
        *,
        up: Code,
        down: Code | None,
        log: Log | None = None,
    ) -> None:
        self.model, self.version = model, 0
        self.stats = ServerStats(workers={worker: WorkerCounts() for worker in served.workers})
        self._rule, self._log = rule, log
        self._whole = Whole(model.numel(), model.dtype)
        self._codes = {code.number: code for code in (self._whole, up)}
        self._down = down
        self._present = set(served.workers)
        self._sent: dict[int, int] = {}
        self._shown: dict[int, Tensor] = {}
        self._since: dict[int, float] = {}
        self._waiting: dict[int, Push] = {}
        self._verdicts: dict[int, Note] = {}
        self._spare: list[Tensor] = []
        self._difference = torch.empty_like(model) if down is not None else model
        rule.start(served)

    def begin(self) -> None:
        """Serving begins, at the model as it is now."""
        self._record(Event(Happened.START, number=self.version, payload=self.model.view(torch.uint8)))

    def join(self, worker: int, moment: int, fresh: bool, at: float) -> Replies:
        """A worker begins, or begins again: it gets the whole model.

        Args:
            worker: its rank.
            moment: of its own state, see `WorkerCounts`.
            fresh: that is empty.
            at: now, in seconds on any clock.

        Raises:
            ProtocolError: for a rank that is no worker, or a state of another moment than this one.
        """
        counts = self._counts(worker)
        if not fresh and moment != counts.moment:
            raise ProtocolError(
                "its state is of another moment than the server's: load checkpoints of the same moment on all ranks, "
                "or let this one begin without"
            )
        self._record(Event(Happened.JOIN, worker, moment, int(fresh), at))
        if fresh:
            counts.moment = moment
        self._present.add(worker)
        self._rule.enter(worker, fresh=fresh)
        self._waiting.pop(worker, None)
        self._shown.pop(worker, None)
        return [(worker, self._answer(worker, at)), *self._settle(at)]

    def push(self, worker: int, header: Header, payload: Tensor, intact: bool, at: float) -> Replies:
        """An update has come; the answers that can be given now, maybe to others, maybe none.

        Raises:
            ProtocolError: for a rank that is no worker, a push too many, another version than this worker was sent,
                an unknown code or a payload of a wrong length.
        """
        counts = self._counts(worker)
        sent = self._sent.get(worker)
        if sent is None:
            raise ProtocolError("it pushes without having been sent a model since its last push")
        if header.number != sent:
            raise ProtocolError(f"its push says version {header.number}, it was sent {sent}")
        update = self._decode(header.code, payload) if intact else None
        self._record(Event(Happened.PUSH, worker, header.number, header.code if intact else 255, at, payload))
        if worker not in self._present:
            self._present.add(worker)
            self._rule.enter(worker, fresh=False)
        staleness = self.version - sent
        del self._sent[worker]
        counts.pushes += 1
        counts.void += update is None
        self.stats.note_push(staleness)
        base = self._shown.get(worker)
        self._waiting[worker] = Push(worker, update, staleness, base, at - self._since[worker])
        return self._settle(at)

    def look(self) -> Tensor:
        """The answer to a worker that wants to see the model: all of it, and nothing changes."""
        return Header(Kind.MODEL, self.version).write(self.model.view(torch.uint8))

    def leave(self, worker: int, lost: bool, at: float) -> Replies:
        """A worker has done its part, or is lost; others may have waited for it."""
        if worker not in self._present:
            return []
        self._record(Event(Happened.LOST if lost else Happened.DONE, worker, at=at))
        self._present.discard(worker)
        if not lost:
            self._sent.pop(worker, None)  # no push can follow
        self._counts(worker).lost += lost
        self._rule.leave(worker, lost=lost)
        return self._settle(at)

    def repeat(self, event: Event) -> None:
        """Let a recorded event happen."""
        what, worker, number, code, at, payload = event
        if what == Happened.START:
            self.model.copy_(self._whole.values(payload))
            self.version = number
        elif what == Happened.JOIN:
            self.join(worker, number, bool(code), at)
        elif what == Happened.PUSH:
            intact = code != 255
            self.push(worker, Header(Kind.PUSH, number, code if intact else 0), payload, intact, at)
        else:
            self.leave(worker, what == Happened.LOST, at)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the model, the rule's state and the counters."""
        workers = {worker: asdict(counts) for worker, counts in self.stats.workers.items()}
        return {
            "model": self.model.clone(),
            "version": self.version,
            "rule": self._rule.state_dict(),
            "workers": workers,
        }

    def state_form(self) -> dict[str, Form]:
        """What a state that can be loaded here looks like; see `hvd_sketch.saved`."""
        counts = {field.name: int for field in fields(WorkerCounts)}
        return {
            "model": self.model,
            "version": int,
            "rule": self._rule.state_form(),
            "workers": dict.fromkeys(self.stats.workers, counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, of the form `state_form`, before any worker joins."""
        self.model.copy_(state["model"])
        self.version = state["version"]
        self._rule.load_state_dict(state["rule"])
        for worker, counts in state["workers"].items():
            self.stats.workers[worker] = WorkerCounts(**counts)

    def _record(self, event: Event) -> None:
        if self._log is not None:
            self._log.write(event)

    def _counts(self, worker: int) -> WorkerCounts:
        try:
            return self.stats.workers[worker]
        except KeyError:
            raise ProtocolError(f"it is none of the workers, which are {sorted(self.stats.workers)}") from None

    def _decode(self, number: int, payload: Tensor) -> Tensor | None:
        """The update behind a payload, None if its values are not finite, or so large that their squares are not."""
        if number not in self._codes:
            raise ProtocolError(f"code {number} was not agreed on")
        update = self._spare.pop().zero_() if self._spare else torch.zeros_like(self.model)
        try:
            self._codes[number].add(payload, update)
        except ValueError as error:
            raise ProtocolError(f"its update cannot be read: {error}") from None
        return update if math.isfinite(torch.dot(update, update)) else None

    def _settle(self, at: float) -> Replies:
        """Take all turns whose time has come."""
        replies: Replies = []
        while (turn := self._rule.turn(self._waiting, self._present)) is not None:
            self._apply([self._waiting.pop(worker) for worker in turn])
            replies += [(worker, self._answer(worker, at)) for worker in self._rule.answers(turn, self._present)]
        return replies

    def _apply(self, pushes: list[Push]) -> None:
        able = [push for push in pushes if push.update is not None]
        verdicts = self._rule.apply(self.model, able) if able else []
        self.version += any(verdicts)
        self._spare += [push.change for push in able]
        for push in pushes:
            self._verdicts[push.worker] = Note.REFUSED
        for push, accepted in zip(able, verdicts, strict=True):
            counts = self.stats.workers[push.worker]
            counts.accepted += accepted
            counts.moment += accepted
            counts.refused += not accepted
            if accepted:
                self._verdicts[push.worker] = Note.ACCEPTED

    def _answer(self, worker: int, at: float) -> Tensor:
        """The message MODEL for a worker."""
        self._sent[worker], self._since[worker] = self.version, at
        self.stats.dense_bytes += self.model.nbytes
        verdict = self._verdicts.pop(worker, Note.NOTHING)
        note = verdict if self._rule.tells else Note.NOTHING
        shown = self._shown.get(worker)
        if shown is not None and self._down is not None:
            difference = torch.sub(self.model, shown, out=self._difference)
            payload = self._down.encode(difference, self.stats.workers[worker].pushes)
            self._down.add(payload, shown)
            return Header(Kind.MODEL, self.version, self._down.number, note).write(payload)
        if self._down is not None or self._rule.needs_base:
            self._shown[worker] = self.model.clone()
        return Header(Kind.MODEL, self.version, Whole.number, note).write(self.model.view(torch.uint8))
