"""Servers without messages, and the model that they serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.layout import Layout
from hvd_sketch.methods.flat import FlatParameters, whole
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.log import Log
from hvd_sketch.methods.server.message import Header, Kind
from hvd_sketch.methods.server.rules import Rule
from hvd_sketch.methods.server.store import Replies, Store
from hvd_sketch.methods.server.validation import Served


class Vector(torch.nn.Module):
    """A model that is one vector."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(values.clone())


def vector(*values: float) -> Tensor:
    """Of float64, in which known answers are exact."""
    return torch.tensor(values, dtype=torch.float64)


def flat(model: torch.nn.Module, layout: Layout | None = None) -> FlatParameters:
    """All parameters of a model, on the host."""
    named = dict(model.named_parameters())
    return FlatParameters(named, layout or whole(named.items()), torch.device("cpu"))


def served(model: torch.nn.Module, samples: dict[int, int]) -> Served:
    return Served(flat(model).layout, model, samples)


class Server:
    """A store and its workers' side of the protocol: each pushes from the model it was sent."""

    def __init__(
        self,
        rule: Rule,
        start: Tensor,
        workers: Sequence[int] | dict[int, int] = (1, 2),
        *,
        up: Code | None = None,
        down: Code | None = None,
        log: Log | None = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        samples = workers if isinstance(workers, dict) else dict.fromkeys(workers, 1)
        whole_code = Whole(start.numel(), start.dtype)
        self.code, self._whole, self._down = up or whole_code, whole_code, down
        self.store = Store(
            start.clone(),
            rule,
            served(model or Vector(start), samples),
            up=self.code,
            down=down,
            log=log,
        )
        self.versions: dict[int, int] = {}
        self.models: dict[int, Tensor] = {}
        self.notes: dict[int, int] = {}
        self.now = 0.0
        self.store.begin()
        for worker in sorted(samples):
            self.take(self.store.join(worker, 0, True, 0.0))

    @property
    def model(self) -> Tensor:
        return self.store.model

    def push(self, worker: int, update: Tensor, at: float | None = None) -> list[int]:
        """Push an update; who was answered."""
        self.now = self.now + 1.0 if at is None else at
        header = Header(Kind.PUSH, self.versions.pop(worker), self.code.number)
        payload = self.code.encode(update.clone(), 0)
        return self.take(self.store.push(worker, header, payload, True, self.now))

    def take(self, replies: Replies) -> list[int]:
        """The workers' side of the store's answers; who got one."""
        for worker, message in replies:
            header, payload, intact = Header.read(message)
            assert intact
            assert header.kind == Kind.MODEL
            self.versions[worker], self.notes[worker] = header.number, header.note
            if header.code == Whole.number:
                self.models[worker] = self._whole.values(payload).clone()
            else:
                assert self._down is not None
                self._down.add(payload, self.models[worker])
        return [worker for worker, _ in replies]


def round_of(server: Server, updates: Sequence[Tensor]) -> None:
    """One synchronous round: workers 1, 2, … push one update each."""
    answered: list[int] = []
    for worker, update in enumerate(updates, start=1):
        assert not answered
        answered = server.push(worker, update)
    assert answered == list(range(1, len(updates) + 1))


def after_round(rule: Rule, updates: Any, start: Tensor | None = None) -> Tensor:
    """How far a synchronous rule goes from zero with the rows of ``updates``, as a gradient points."""
    rows = torch.as_tensor(updates, dtype=torch.float64)
    begin = torch.zeros(rows.shape[1], dtype=torch.float64) if start is None else start
    server = Server(rule, begin, range(1, len(rows) + 1))
    round_of(server, list(rows))
    return begin - server.model
