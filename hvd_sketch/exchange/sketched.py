"""SketchedSGD on allreduce: a summed sketch finds the heavy coordinates, a second round fetches them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator, Pending
from hvd_sketch.errors import RankMismatchError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.plan import SketchPlan
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum
from hvd_sketch.sketch import CountSketch


class Planner(Protocol):
    """Sizes for a step, or None to send everything; equal on all ranks."""

    def __call__(self, layout: Layout, step: int) -> SketchPlan | None: ...


class SketchExchange(Exchange):
    """The two-round exchange (Algorithm 3 of arXiv 1903.04488, on allreduce).

    With computed memory v_i on rank i, table sketch S and W ranks::

        round 1   T = sum_i S(v_i)                 allreduce of rows * cols cells + dense part
                  C = the P k coordinates of largest |estimate from T|    same on every rank
        round 2   x_j = sum_i v_i[j], j in C       allreduce of P k exact values
                  update = x at its k largest, divided by W;  v_i loses what it sent

    The sketch is linear: what the memory carries into the next step is sketched while round 2 is
    under way, and only the gradient is left to add, in one pass over the whole vector.

    In half precision cells and values carry a shared power-of-two scale, and what rounding cut
    off stays in the memory. Buckets and signs are drawn anew in every step.
    A digest of C rides in round 2: if ranks chose differently, all raise `RankMismatchError`, and
    the memory holds the step's gradients, unsent.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        settings: str,
        planner: Planner,
        *,
        average: bool,
        clip_norm: float | None,
        momentum: Momentum | None,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(
            layout,
            comm,
            settings,
            average=average,
            clip_norm=clip_norm,
            momentum=momentum,
            device=device,
        )
        self._planner, self._seed, self._dtype = planner, seed, dtype
        self._cell_scale: float | None = None  # until a sum other than zero was seen, messages are float32
        self._dense_scale: float | None = None
        self._plan: SketchPlan | None = None
        self._chosen: Tensor | None = None
        self._dense = slice(layout.compressed, layout.total)
        self._carried: tuple[int, ...] = ()
        self._prepare()

    def _prepare(self) -> None:
        """Sizes, table and messages for the coming step."""
        plan = self._planner(self.layout, self.step)
        if plan is not None and plan != self._plan:
            device = self.gradient.device
            self._sketch = CountSketch(self.layout.compressed, plan.rows, plan.cols, device=device)
            self._carried = ()
            cells = plan.rows * plan.cols
            self._message = torch.zeros(wire.HEADER + cells + self.layout.dense, dtype=self._dtype, device=device)
            lanes = wire.HEADER + wire.DIGEST_BITS + plan.candidates
            self._answer = torch.zeros(lanes, dtype=self._dtype, device=device)
        self._plan = plan

    def _is_dense_step(self) -> bool:
        return self._plan is None

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._prepare()

    def _send_selected(self, clip: float, finite: bool) -> bool:
        plan, memory = self._plan, self.memory
        assert plan is not None
        with self.stats.phase("sketch"):
            self._sketch_computed(clip)
            dense_values = memory.computed(self.gradient, clip, self._dense)
        dense_left = self._sum_tables(dense_values, finite)
        if dense_left is None:
            self._chosen = None
            return False
        with self.stats.phase("select"):
            candidates, estimates = self._sketch.top_k(plan.candidates)
            computed = memory.computed(self.gradient, clip, candidates)
            norm = self._sketch.l2_norm()
        pending, scale, left = self._start_exact(candidates, computed, float(estimates.abs().max()))
        if plan.k == plan.candidates:  # what will be sent is known: the memory moves on while the values travel
            self._advance(clip, dense_left, candidates, left)
        if not self._finish_exact(pending, scale, sums := torch.empty_like(computed)):
            if plan.k < plan.candidates:
                memory.absorb(self.gradient, clip)
            memory.keep(self._dense, dense_values, mask=False)
            memory.keep(candidates, computed, mask=False)
            raise RankMismatchError(self._mismatch())
        if plan.k < plan.candidates:
            kept = torch.sort(sums.abs(), descending=True, stable=True).indices[: plan.k]
            candidates, sums, left = candidates[kept], sums[kept], left[kept]
            self._advance(clip, dense_left, candidates, left)
        with self.stats.phase("memory"):
            self._write_update(candidates, sums, norm)
        return True

    def _sketch_computed(self, clip: float) -> None:
        """Complete the table of this step's computed memory: what is carried, and the gradient."""
        if self._carried != self._carried_into(self.step):
            self._sketch_carried(self.step)
        self._carried = ()
        self._sketch.add(self.gradient[: self.layout.compressed], scale=self.memory.gain * clip)

    def _sketch_carried(self, step: int) -> None:
        """Draw the buckets and signs of a step, and sketch what the memory carries into it."""
        self._sketch.reset((self._seed << 32) + step)
        self.memory.sketch_carried(self._sketch, 0, self.layout.compressed)
        self._carried = self._carried_into(step)

    def _carried_into(self, step: int) -> tuple[int, ...]:
        """Tells whether a table made ahead still is that of the memory, which others may change between steps."""
        memory = self.memory
        return (step, memory.residual._version, 0 if memory.velocity is None else memory.velocity._version)

    def _advance(self, clip: float, dense_left: Tensor, sent: Tensor, left: Tensor) -> None:
        """Take the gradient in, keep what was not sent, and sketch that for the next step."""
        with self.stats.phase("memory"):
            self.memory.absorb(self.gradient, clip)
            self.memory.keep(self._dense, dense_left, mask=False)
            self.memory.keep(sent, left, mask=True)
        with self.stats.phase("sketch"):
            self._sketch_carried(self.step + self._all_present)

    def _sum_tables(self, dense_values: Tensor, finite: bool) -> Tensor | None:
        """Round 1. Leaves the summed table in ``_sketch`` and the dense update in place.

        Returns what rounding left behind of the dense values, or None if some rank is not finite.
        """
        ranks, cells = self.comm.size, self._sketch.table.view(-1)
        message = self._message if self._cell_scale else self._message.to(torch.float32)
        table_lanes = message[wire.HEADER : wire.HEADER + cells.numel()]
        dense_lanes = message[wire.HEADER + cells.numel() :]
        cell_scale, dense_scale = self._cell_scale or 1.0, self._dense_scale or 1.0
        wire.pack(table_lanes, cells, cell_scale, ranks)
        wire.pack(dense_lanes, dense_values.clone(), dense_scale, ranks)
        sent = wire.unpack(dense_lanes, dense_scale, torch.empty_like(dense_values))
        if not self._sum(message, finite, "table"):
            return None
        wire.unpack(table_lanes, cell_scale, cells)
        update = wire.unpack(dense_lanes, dense_scale, self.update[self.layout.compressed :])
        self._rescale(_largest(cells) / ranks, _largest(update) / ranks)
        update.mul_(1.0 / self._mean_divisor())
        return dense_values - sent

    def _start_exact(self, candidates: Tensor, computed: Tensor, largest: float) -> tuple[Pending, float, Tensor]:
        """Begin round 2: the collective, the scale of its values, and what rounding leaves behind of them here."""
        ranks, message = self.comm.size, self._answer
        scale = wire.shared_scale(largest / ranks, ranks, message.dtype)
        lanes = message[wire.HEADER + wire.DIGEST_BITS :]
        with self.stats.phase("exchange"):
            wire.write_header(message, True)
            wire.write_digest(message[wire.HEADER : wire.HEADER + wire.DIGEST_BITS], candidates)
            wire.pack(lanes, computed.clone(), scale, ranks)
            left = computed - wire.unpack(lanes, scale, torch.empty_like(computed))
            return self.comm.start_allreduce(message, self._name("values")), scale, left

    def _finish_exact(self, pending: Pending, scale: float, sums: Tensor) -> bool:
        """End round 2: fill in the candidates' sums over the ranks; False if ranks chose differently."""
        with self.stats.phase("exchange"):
            pending.wait()
            wire.unpack(self._answer[wire.HEADER + wire.DIGEST_BITS :], scale, sums)
        return wire.digests_agree(self._answer[wire.HEADER : wire.HEADER + wire.DIGEST_BITS], self._answer[1])

    def _mismatch(self) -> str:
        return (
            f"hvd_sketch: in step {self.step} the ranks selected different coordinates from the same sum, seen "
            f"on rank {self.comm.rank} and all others. The backend's allreduce does not give all ranks the same "
            "bits, or they run different builds: use one build of hvd_sketch and PyTorch on all ranks, and a "
            "deterministic allreduce algorithm"
        )

    def _rescale(self, largest_cell: float, largest_dense: float) -> None:
        """Scales of the next step's half-precision messages, from means that all ranks know; none from zeros."""
        if not self._all_present:
            return
        ranks = self.comm.size
        known = largest_cell > 0.0 and (largest_dense > 0.0 or not self.layout.dense)
        self._cell_scale = wire.shared_scale(largest_cell, ranks, self._dtype) if known else None
        self._dense_scale = wire.shared_scale(largest_dense, ranks, self._dtype) if known else None

    def _write_update(self, chosen: Tensor, sums: Tensor, norm: float) -> None:
        if self._chosen is None:
            self.update[: self.layout.compressed].zero_()
        else:
            self.update.index_fill_(0, self._chosen, 0.0)
        self.update.index_copy_(0, chosen, sums * (1.0 / self._mean_divisor()))
        self._chosen = chosen
        energy = float(torch.linalg.vector_norm(sums)) ** 2
        self.stats.captured_energy = min(1.0, energy / norm**2) if norm > 0 else 1.0

    def _send_everything(self, clip: float, finite: bool, dtype: torch.dtype = torch.float32) -> bool:
        self._chosen = None
        return super()._send_everything(clip, finite, dtype)

    def reset(self) -> None:
        super().reset()
        self._prepare()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._cell_scale, self._dense_scale = state["cell_scale"], state["dense_scale"]
        self._prepare()

    def _extra_state(self) -> dict[str, Any]:
        return {"cell_scale": self._cell_scale, "dense_scale": self._dense_scale}


def _largest(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, ord=torch.inf)) if values.numel() else 0.0
