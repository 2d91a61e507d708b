"""Training with many ranks in one process, on one model where they share it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hvd_sketch
from benchmarks.accuracy.large.model import Gradient, Language, Size, evaluate, loss_of
from benchmarks.accuracy.large.text import Batch, Text
from benchmarks.accuracy.simulate import learning_rate
from hvd_sketch import Anticipate
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.anticipate import respond
from hvd_sketch.error_feedback.factored_moments import MomentsObserver
from hvd_sketch.exchange import DenseExchange, Exchange
from hvd_sketch.exchange.common_share import CommonShare, read_errors
from hvd_sketch.layout import Layout

MOMENTS = 12
"""How often a run is evaluated."""


@dataclass(frozen=True)
class Method:
    """How the ranks of a training exchange.

    Attributes:
        compressor: of gradients in every step, or with a period of models; None for dense.
        anticipate: the error feedback, if any.
        period: local steps between two exchanges; 0 to exchange every gradient.
        soft_sign: whether the step is `hvd_sketch.SoftSign`'s.
    """

    compressor: Compressor | None = None
    anticipate: Anticipate | None = None
    period: int = 0
    soft_sign: bool = False


@dataclass(frozen=True)
class Plan:
    """A training: its size and length, on which text and device, until which moment of ``time.monotonic()``."""

    size: Size
    text: Text
    ranks: int
    steps: int
    seed: int
    until: float

    @property
    def device(self) -> torch.device:
        """Where the text is."""
        return self.text.train.device

    def model(self) -> Language:
        """The model before the first step."""
        torch.manual_seed(self.seed)
        return Language(self.size).to(self.device)

    def batches(self, rank: int) -> Iterator[Batch]:
        """A rank's batches, one for each step."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank + 1)
        for _ in range(self.steps):
            yield self.text.batch(generator, self.size.batch, self.size.context)

    def held_out(self) -> list[Batch]:
        """The same for all trainings."""
        generator, size = torch.Generator().manual_seed(12345), self.size
        number = size.held_out // size.batch
        return [self.text.batch(generator, size.batch, size.context, held_out=True) for _ in range(number)]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam with decoupled weight decay."""
        return torch.optim.AdamW(model.parameters(), lr=self.size.rate, betas=(0.9, 0.95), weight_decay=0.1)


@dataclass
class Outcome:
    """Validation losses by step, with the bytes that one rank sent until then; and how long it took."""

    losses: list[tuple[int, int, float]] = field(default_factory=list)
    seconds: float = 0.0


def train(method: Method, plan: Plan) -> Outcome:
    """Train from the plan's start, until it is through or the time is over."""
    run = _train_apart if method.period else _train_shared
    return run(method, plan)


def _train_shared(method: Method, plan: Plan) -> Outcome:
    model = plan.model()
    ranks, feeds = SharedRanks(model, method, plan), [plan.batches(rank) for rank in range(plan.ranks)]
    held_out = plan.held_out()

    def step() -> None:
        ranks.step([next(feed) for feed in feeds])

    def look() -> tuple[int, float, bool]:
        return ranks.bytes_sent(), evaluate(model, held_out), time.monotonic() > plan.until

    return _follow(plan, ranks.optimizer, step, look)


def _follow(
    plan: Plan, optimizer: Any, step: Callable[[], object], look: Callable[[], tuple[int, float, bool]]
) -> Outcome:
    """Take the steps, and look now and then: at the bytes sent, the loss, and whether the time is over."""
    schedule, outcome, start = learning_rate(optimizer, plan.steps), Outcome(), time.monotonic()
    for number in range(1, plan.steps + 1):
        step()
        schedule.step()
        if number == plan.steps or number % max(1, plan.steps // MOMENTS) == 0:
            sent, loss, over = look()
            outcome.losses.append((number, sent, loss))
            outcome.seconds = time.monotonic() - start
            if over:
                break
    return outcome


class SharedRanks:
    """Ranks that exchange every gradient, so that one model and one optimizer serve all of them."""

    def __init__(self, model: Language, method: Method, plan: Plan) -> None:
        self._parameters = dict(model.named_parameters())
        self._group = InProcessGroup(plan.ranks)
        self._exchanges = [
            _exchange(method, self._parameters, comm, plan.device) for comm in self._group.communicators
        ]
        index = self._exchanges[0].layout.index()
        self._places = {index[name]: parameter for name, parameter in self._parameters.items()}
        optimizer = plan.optimizer(model)
        self.optimizer = hvd_sketch.SoftSign(optimizer) if method.soft_sign else optimizer
        self._shares: list[CommonShare] = []
        self._moments: list[MomentsObserver] = []
        self._anticipate = method.anticipate
        if method.anticipate is not None:
            self._follow(method.anticipate)
        first = next(plan.batches(0))
        self._gradient = Gradient(model, first)

    def bytes_sent(self) -> int:
        """By one rank."""
        return self._exchanges[0].stats.bytes_sent

    def step(self, batches: list[Batch]) -> None:
        """Every rank's gradient, the exchange, and the step of all."""
        for rank, batch in enumerate(batches):
            with self._ahead(rank):
                self._gradient(batch)
            self._exchanges[rank].submit_many(self._gradients())
        self._group.run(lambda comm: self._exchanges[comm.rank].run())
        self._exchanges[0].write_update(self._gradients())
        for moments in self._moments[:1]:
            moments.lend(self.optimizer)
        self.optimizer.step()

    def _gradients(self) -> dict[int, Tensor]:
        gradients = {position: parameter.grad for position, parameter in self._places.items()}
        return {position: gradient for position, gradient in gradients.items() if gradient is not None}

    def _follow(self, anticipate: Anticipate) -> None:
        for exchange in self._exchanges:
            self._shares.append(CommonShare())
            self._shares[-1].attach(exchange)
            if anticipate.second_moments is not None:
                self._moments.append(MomentsObserver(anticipate.second_moments, self._parameters.items()))
                self._moments[-1].attach(exchange)

    @contextmanager
    def _ahead(self, rank: int) -> Iterator[None]:
        """The model where this rank takes its gradient, as `Anticipate` defines it."""
        if self._anticipate is None:
            yield
            return
        parameters = [self._places[position].detach() for position in range(len(self._places))]
        before = [torch.empty_like(parameter) for parameter in parameters]
        torch._foreach_copy_(before, parameters)
        torch._foreach_sub_(parameters, self._moves(rank))
        yield
        torch._foreach_copy_(parameters, before)

    def _moves(self, rank: int) -> list[Tensor]:
        exchange, shares = self._exchanges[rank], self._shares[rank].shares
        assert self._anticipate is not None
        errors = torch.empty_like(exchange.memory.residual)
        read_errors(exchange, errors)
        views = [errors[slot.offset : slot.stop].view(slot.shape) for slot in exchange.layout.slots]
        if shares is not None:
            coefficient = self._anticipate.coefficient_of(self.optimizer)
            torch._foreach_mul_(views, list((coefficient * shares).unbind()))
        (group,) = self.optimizer.param_groups
        respond(self.optimizer, group, [self._places[position] for position in range(len(views))], views)
        return views


def _exchange(
    method: Method, parameters: dict[str, nn.Parameter], comm: Communicator, device: torch.device
) -> Exchange:
    if method.compressor is None:
        layout = Layout.of(parameters.items(), lambda name, parameter: False)
        return DenseExchange(layout, comm, average=True, device=device)
    layout = method.compressor.layout(parameters.items())
    return method.compressor.exchange(layout, comm, average=True, device=device)


def _train_apart(method: Method, plan: Plan) -> Outcome:
    """Every rank has a model, an optimizer and a thread of its own."""
    held_out = plan.held_out()

    def body(comm: Communicator) -> Outcome:
        model, feed = plan.model(), plan.batches(comm.rank)
        optimizer: Any = hvd_sketch.LocalSGD(
            plan.optimizer(model), model, comm, compression=method.compressor, period=method.period
        )
        sent = [0]

        def step() -> None:
            before = comm.bytes_sent
            optimizer.zero_grad()
            loss_of(model, next(feed)).backward()
            optimizer.step()
            sent[0] += comm.bytes_sent - before  # what an evaluation sends is no part of the training

        def look() -> tuple[int, float, bool]:
            with optimizer.average_model():
                loss = evaluate(model, held_out) if comm.rank == 0 else math.nan
            over = comm.allgather_object(time.monotonic() > plan.until, "over")
            return sent[0], loss, any(over)

        return _follow(plan, optimizer, step, look)

    return InProcessGroup(plan.ranks).run(body)[0]
