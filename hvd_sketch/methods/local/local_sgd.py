"""Local SGD whose meetings are compressed, with error feedback, on one way or on both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch

from hvd_sketch.compressors.compression import Compression
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import DenseExchange, Exchange
from hvd_sketch.exchange.common_share import CommonShare, read_errors
from hvd_sketch.methods.displacement import displacement_exchange, layout_rule
from hvd_sketch.methods.flat import Flat
from hvd_sketch.methods.local.base import LocalSteps, Rhythm
from hvd_sketch.saved import Form
from hvd_sketch.settings import check_numbers

MomentumSync = Literal["keep", "reset", "average"]


class OuterOptions(TypedDict, total=False):
    """The keywords of `LocalSGD` that make an `Outer`."""

    momentum_sync: MomentumSync
    outer_rate: float
    outer_momentum: float
    nesterov: bool
    anticipate: float


@dataclass(frozen=True)
class Outer:
    """What ranks do when they meet: the step that they take together, and what becomes of their own momenta."""

    momentum_sync: MomentumSync = "keep"
    outer_rate: float = 1.0
    outer_momentum: float = 0.0
    nesterov: bool = True
    anticipate: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.momentum_sync not in ("keep", "reset", "average"):
            raise ConfigurationError(f"momentum_sync must be keep, reset or average, got {self.momentum_sync!r}")
        if not 0.0 < self.outer_rate < math.inf or not 0.0 <= self.outer_momentum < 1.0:
            raise ConfigurationError(
                "outer_rate must be above 0 and finite, and outer_momentum in [0, 1), "
                f"got {self.outer_rate} and {self.outer_momentum}"
            )
        if not 0.0 <= self.anticipate <= 1.0:
            raise ConfigurationError(f"anticipate must be in [0, 1], got {self.anticipate}")


class LocalSGD(LocalSteps):
    """H local steps, then an exchange of how far each rank went.

    With the model x of the last meeting, this rank's z_i after H more steps of any optimizer, and
    errors e_i in units of the update::

        d_i = x - s_i - z_i + e_i    c_i = C(d_i)           e_i <- d_i - c_i
        q = mean_i c_i
        x <- x - r q                                        plain
        u <- b u + q / lr,   x <- x - r lr u                outer momentum b (SlowMo)
        u <- b u + q,        x <- x - r (q + b u)           with Nesterov (DiLoCo)
        s_i = r a c e_i,     z_i <- x - s_i                 a = 0: all ranks begin at x

    SlowMo's momentum is in units of the gradient, so that it shrinks with the learning rate lr, each parameter's
    own at the meeting; where lr is 0, u becomes ``b u`` and x moves by ``-r q``.

    Where ``anticipate``, a, is above 0, each rank begins ahead of x, where what it has not sent will in the end have
    taken the model, as far as one rank can know: c is the share of e_i that the ranks have in common, measured for
    every parameter, see `CommonShare`. Then ranks are at one model after `flush` alone, and not after every meeting.

    Without outer momentum and with r = 1, ``x - mean_i e_i`` moves by exactly ``-mean_i (x - z_i)``.
    ``Compression.sharded`` compresses the way down as well: double compression, with the server's
    error kept by each shard's owner. ``Compression.none`` is plain local SGD; FedAvg.

    Sent: what the compressor sends, once every H steps; with ``momentum_sync="average"`` the
    optimizer's state besides, in float32; with ``anticipate`` what `CommonShare` sends. State: two vectors of the
    model's size and the exchange's three, where the parameters are, and one each with outer momentum and anticipation.
    Sources: Gao, Xu, Huang, "On the convergence of communication-efficient local SGD for federated
    learning" (AAAI 2021); SlowMo, arXiv 1910.00643; DiLoCo, arXiv 2311.08105.

    Args:
        optimizer: takes the local steps; any.
        model: what it trains.
        comm: an mpi4py communicator or one of ours; Horovod where it is installed if None.
        compression: a member of `Compression`; its ``clip_norm`` clips every local gradient.
        period: H, in steps.
        same_start: begin with rank 0's parameters and saved buffers on every rank.
        momentum_sync: what happens to the optimizer's own state when ranks meet: ``keep`` it on each
            rank, as happens when not given, ``reset`` it, or ``average`` it over the ranks.
        outer_rate: r, 1 when not given.
        outer_momentum: b; 0 for none, as when not given.
        nesterov: which of the two outer momenta; DiLoCo's when not given.
        anticipate: a, 0 to 1; 0 when not given.

    Raises:
        ConfigurationError: for settings out of range.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    exchange: Exchange

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        *,
        compression: Any = Compression.none,
        period: int = 8,
        same_start: bool = True,
        **outer: Unpack[OuterOptions],
    ) -> None:
        self._outer = Outer(**outer)
        clip_norm, layout = getattr(compression, "clip_norm", None), layout_rule(compression)
        rhythm = Rhythm(period=period, clip_norm=clip_norm, same_start=same_start, layout=layout)
        settings = {"compression": repr(compression), "outer": str(self._outer)}
        super().__init__(optimizer, model, comm, rhythm, settings)
        exchange = displacement_exchange(compression, self._flat.layout, self._collectives, self._flat.device)
        exchange.log.notes.append(f"LocalSGD, in every {period} steps")
        self._own(exchange=exchange)
        self._shares, self._ahead = CommonShare(), None
        if self._outer.anticipate:
            if isinstance(exchange, DenseExchange):
                raise ConfigurationError("anticipate: with Compression.none nothing is unsent; leave it out")
            self._ahead = self._flat.new()
            self._shares.attach(exchange)
        self._velocity = self._flat.new() if self._outer.outer_momentum else None
        self._anchor = self._present()

    def _meet(self) -> None:
        anchor, moved = self._anchor.vector, self._live.vector
        self._flat.read(self._live)
        torch.sub(anchor, moved, out=moved)
        if self._ahead is not None:
            moved.sub_(self._ahead.vector)
        self.exchange.submit_all(moved)
        self.exchange.run()
        if math.isnan(float(self.exchange.update[0])):
            self.stats.skipped += 1
        else:
            moved.copy_(self.exchange.update)
            self._outer_step(self._live)
        self._begin_round()
        if self._outer.momentum_sync == "reset":
            self.optimizer.state.clear()
        elif self._outer.momentum_sync == "average":
            self._average_optimizer()

    def _begin_round(self) -> None:
        """At x, or ahead of it."""
        if self._ahead is None:
            self._flat.write(self._anchor)
            return
        self._look_ahead(self._ahead)
        torch.sub(self._anchor.vector, self._ahead.vector, out=self._live.vector)
        self._flat.write(self._live)

    def _look_ahead(self, ahead: Flat) -> None:
        """How far ahead of x this rank begins, s_i."""
        shares = self._shares.shares
        if shares is None:  # ranks have not met yet
            ahead.vector.zero_()
            return
        read_errors(self.exchange, ahead.vector)
        factors = self._outer.outer_rate * self._outer.anticipate * shares.to(self._flat.dtype)
        torch._foreach_mul_(ahead.views, list(factors.unbind()))

    def _outer_step(self, update: Flat) -> None:
        anchor, rate, factor = self._anchor.vector, self._outer.outer_rate, self._outer.outer_momentum
        anchor.sub_(update.vector, alpha=rate)
        if self._velocity is None:
            return
        self._velocity.vector.mul_(factor)
        if self._outer.nesterov:
            self._velocity.vector.add_(update.vector)
            anchor.sub_(self._velocity.vector, alpha=rate * factor)
        else:
            self._slow_momentum(self._velocity, update)

    def _slow_momentum(self, velocity: Flat, update: Flat) -> None:
        """The momentum's part of the step, ``x - r lr b a``, then ``b a + q / lr``."""
        for group, at in zip(self.param_groups, self._flat.groups, strict=True):
            learning_rate = float(group["lr"])
            if learning_rate == 0.0 or not at:
                continue
            momenta, updates, anchors = ([flat.views[p] for p in at] for flat in (velocity, update, self._anchor))
            torch._foreach_add_(anchors, momenta, alpha=-self._outer.outer_rate * learning_rate)
            torch._foreach_add_(momenta, updates, alpha=1.0 / learning_rate)

    def _average_optimizer(self) -> None:
        states = [self.optimizer.state[parameter] for parameter in self._flat.parameters]
        tensors = [
            value
            for state in states
            for _, value in sorted(state.items())
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        if tensors:
            torch._foreach_copy_(tensors, self._mean(*tensors))

    def _unsent(self, vector: torch.Tensor) -> None:
        if self._ahead is not None:
            vector.add_(self._ahead.vector)
        vector.sub_(self.exchange.in_model(self.exchange.memory.residual))

    def restart(self) -> None:
        super().restart()
        self.exchange.reset()
        if self._velocity is not None:
            self._velocity.vector.zero_()
        if self._ahead is not None:
            self._ahead.vector.zero_()
        self._flat.read(self._anchor)

    def _own_state(self) -> dict[str, Any]:
        state = {"exchange": self.exchange.state_dict(), "anchor": self._anchor.vector.clone()}
        return state if self._velocity is None else {**state, "velocity": self._velocity.vector.clone()}

    def _own_form(self) -> dict[str, Form]:
        form = {"exchange": self.exchange.state_form(), "anchor": self._anchor.vector}
        return form if self._velocity is None else {**form, "velocity": self._velocity.vector}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.exchange.load_state_dict(state["exchange"])
        self._anchor.vector.copy_(state["anchor"])
        if self._velocity is not None:
            self._velocity.vector.copy_(state["velocity"])
        if self._ahead is not None:
            self._look_ahead(self._ahead)
