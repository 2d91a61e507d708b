"""SketchedSGD on allreduce: a summed sketch finds the heavy coordinates, a second round fetches them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Pending
from hvd_sketch.compressors.sketch.bucket import Scales, SketchBucket
from hvd_sketch.compressors.sketch.plan import SketchPlan
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.exchange import Exchange, Setting
from hvd_sketch.exchange.intake import Factor, Finite
from hvd_sketch.saved import Form


class SketchExchange(Exchange):
    """The two-round exchange (Algorithm 3 of arXiv 1903.04488, on allreduce).

    With computed memory v_i on rank i, table sketch S and W ranks::

        round 1   T = sum_i S(v_i)                    allreduce of rows * cols cells
                  C = the P k coordinates of largest |estimate from T|       same on every rank
                  D = every R-th coordinate, from an offset drawn anew       same on every rank
        round 2   x_j = sum_i v_i[j], j in C and D    allreduce of P k + compressed / R exact values + dense part
                  update = x at the k largest of C and at D, divided by W;  v_i loses what it sent

    D, which the paper does not have, is what bounds the time that a coordinate waits.

    The sketch is linear: what the memory carries into the next step is sketched while round 2 is
    under way, and only the gradient is left to add, in one pass over the whole vector.

    The layout's buckets go through both rounds one behind the other, each with its part of table and k,
    in one order on all ranks: round 1 of every bucket, then round 2 of every bucket. Round 1 of a bucket
    starts when its gradients and those of the buckets before it are there, so while backward computes the
    others. Its clip factor then follows from the norms that are known, and for the buckets that are not
    there yet from the last step's.

    In half precision cells carry a shared power-of-two scale and values travel on a `hvd_sketch.grid`;
    what is rounded off stays in the memory. Buckets and signs are drawn anew in every step.
    A digest of C and of the scales rides in round 2: if ranks chose differently, all raise `RankMismatchError`, and
    the memory holds the step's gradients, unsent.
    """

    def __init__(self, setting: Setting, seed: int, dtype: torch.dtype) -> None:
        super().__init__(setting)
        layout = setting.layout
        self._seed, self._dtype = seed, dtype
        self._prepared: SketchPlan | None = None
        self._buckets: list[SketchBucket] = []
        dense = [where.stop - where.start - size for where, size in zip(layout.buckets, layout.sizes, strict=True)]
        self._scales = [Scales(coordinates, dtype) for coordinates in dense]
        self._norms = [0.0 for _ in layout.buckets]
        self._positions = [layout.positions(where) for where in layout.buckets]
        self._firsts: list[Pending] = []  # round 1 of so many buckets has started
        self._carried: tuple[int, ...] = ()
        self._prepare()

    def submit(
        self,
        position: int,
        gradient: Tensor,
        factor: float = 1.0,
        parameter: Tensor | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """As for every `Exchange`; the gradient may be the last one that a bucket waits for."""
        super().submit(position, gradient, factor, parameter, weight_decay)
        if self.streams and self.agreed and self.plan is not None:
            self._start_complete()

    def submit_many(self, gradients: Mapping[int, Tensor], factor: float = 1.0) -> None:
        """As for every `Exchange`; they may be the last ones that a bucket waits for."""
        super().submit_many(gradients, factor)
        if self.streams and self.agreed and self.plan is not None:
            self._start_complete()

    @property
    def streams(self) -> bool:
        """Where there are several buckets, and a hook of backward may communicate."""
        return len(self._norms) > 1 and self.comm.starts_in_backward(self.gradient.device)

    def has_begun(self, position: int) -> bool:
        """Where round 1 of a bucket that has some of it has started."""
        begun = len(self._firsts)
        return begun > 0 and self.layout.slots[position].offset < self.layout.buckets[begun - 1].stop

    def complete(self) -> None:
        """As for every `Exchange`."""
        try:
            super().complete()
        finally:
            self._firsts.clear()
            if self.absent:
                self._carried = ()  # the table has what was set aside
            self._norms = [norm if math.isfinite(norm) else 0.0 for norm in self._norms]
            self._prepare()

    def reset(self) -> None:
        """As for every `Exchange`."""
        super().reset()
        self._firsts.clear()
        self._prepared = None  # new messages: the old ones may still be under way
        self._prepare()

    def own_state(self) -> dict[str, Any]:
        """The scales of each bucket."""
        return {"scales": [scales.state() for scales in self._scales]}

    def own_form(self) -> Form:
        """The same of each bucket."""
        return {"scales": [scales.form() for scales in self._scales]}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        for scales, saved in zip(self._scales, state["scales"], strict=True):
            scales.restore(saved, self.gradient.device)
        self._prepared = None
        self._prepare()

    def _prepare(self) -> None:
        """Table and messages for the coming step."""
        plan: SketchPlan | None = self.plan
        if plan is not None and plan != self._prepared:
            wheres, sizes = self.layout.buckets, self.layout.sizes
            self._carried = ()
            self._buckets = [
                SketchBucket(self.gradient[where], self.memory.part(where), size, part, scales, self._dtype)
                for where, size, part, scales in zip(wheres, sizes, plan.split(sizes), self._scales, strict=True)
            ]
        self._prepared = plan

    def send(self, plan: SketchPlan, clip: Factor, finite: Finite) -> bool:
        """Both rounds of every bucket."""
        while len(self._firsts) < len(self._buckets):
            self._start_first(clip, finite)
        headers, seconds = [], []
        for number in range(len(self._buckets)):
            headers.append(self._end_first(number))
            seconds.append(self._start_second(number) if headers[-1].finite else None)
        header = headers[-1]  # made when all gradients were there, so it speaks for the whole step
        if header.void:
            _wait(seconds)
        try:
            taken = self.rounds.heed(header)
        except ConfigurationError:
            _wait(seconds)
            raise
        if not taken:
            return False
        self._finish(seconds, all_applied=plan.k == plan.candidates)
        return True

    def _start_complete(self) -> None:
        """Start round 1 of the next buckets whose gradients are there, except for the last one."""
        for pending in self._firsts:
            pending.poll()
        while (number := len(self._firsts)) < len(self._buckets) - 1:
            if not self.staging.complete(self._positions[number]):
                return
            self._norms[number] = self.staging.norm(self._positions[number])
            with self.stats.counting(self.comm):
                self._start_first(self.clip_factor(math.hypot(*self._norms)), math.isfinite(self._norms[number]))

    def _start_first(self, clip: Factor, finite: Finite) -> None:
        """Start round 1 of the next bucket."""
        number = len(self._firsts)
        with self.stats.phase("sketch"):
            if number == 0:
                self._carry()
            message = self._buckets[number].pack(clip, self.comm.size)
        with self.stats.phase("exchange"):
            self._firsts.append(self.rounds.start_sum(message, finite, f"table{number}"))

    def _end_first(self, number: int) -> wire.Header:
        with self.stats.phase("exchange"):
            self._firsts[number].wait()
        with self.stats.phase("select"):
            return self._buckets[number].open(self.comm.size)

    def _start_second(self, number: int) -> Pending:
        with self.stats.phase("select"):
            message = self._buckets[number].choose(self.comm, self.step, self._seed)
        with self.stats.phase("exchange"):
            return self.comm.start_allreduce(message, self.rounds.name_of(f"values{number}"))

    def _finish(self, seconds: list[Pending | None], *, all_applied: bool) -> None:
        """Move the memory on, while the values travel where all of them will be applied, and write the update."""
        if all_applied:
            self._advance()
        with self.stats.phase("exchange"):
            _wait(seconds)
        if not all(bucket.read(self.comm) for bucket in self._buckets):
            for bucket in self._buckets:
                bucket.put_back(advanced=all_applied)
            self._carried = ()
            raise RankMismatchError(self._mismatch())
        if not all_applied:
            self._advance()
        with self.stats.phase("memory"):
            divisor, wheres = self.divisor, self.layout.buckets
            parts = [bucket.update(where, divisor) for bucket, where in zip(self._buckets, wheres, strict=True)]
            self.hold(*chain(*parts))
            whole = sum(bucket.norm**2 for bucket in self._buckets)
            sent = sum(bucket.energy for bucket in self._buckets)
            self.stats.captured_energy = min(1.0, sent / whole) if whole > 0 else 1.0

    def _advance(self) -> None:
        step = self.step + self.rounds.all_present
        with self.stats.phase("memory"):
            for bucket in self._buckets:
                bucket.advance(self._draws_of(step))
        self._carried = (step, *self.memory.version())

    def _carry(self) -> None:
        """Sketch what the memory carries into the step, unless the last one did and nobody has written to it since."""
        if self._carried != (self.step, *self.memory.version()):
            for bucket in self._buckets:
                bucket.carry(self._draws_of(self.step))
        self._carried = ()

    def _draws_of(self, step: int) -> int:
        return (self._seed << 32) + step

    def measure(self) -> tuple[Factor, Finite]:
        """As for every `Exchange`; of several buckets the norms of those that have started are numbers of the host."""
        return super().measure() if len(self._norms) == 1 else self.judge(self.gradient_norm())

    def gradient_norm(self) -> float:
        """Of the buckets that have started already, the norm is known."""
        for number in range(len(self._firsts), len(self._norms)):
            self._norms[number] = self.staging.norm(self._positions[number])
        return math.hypot(*self._norms)

    def _mismatch(self) -> str:
        return (
            f"hvd_sketch: in step {self.step} the ranks selected different coordinates from the same sum, seen "
            f"on rank {self.comm.rank} and all others. The backend's allreduce does not give all ranks the same "
            "bits, or they run different builds: use one build of hvd_sketch and PyTorch on all ranks, and a "
            "deterministic allreduce algorithm"
        )


def _wait(collectives: list[Pending | None]) -> None:
    for pending in collectives:
        if pending is not None:
            pending.wait()
