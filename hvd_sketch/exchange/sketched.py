"""SketchedSGD on allreduce: a summed sketch finds the heavy coordinates, a second round fetches them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
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

    The sketch is linear, so it is built while backward runs: what the memory carries and the
    fresh gradients go to two tables as `submit` is called, and the local clip factor, known
    only at the end, multiplies the second before they are added.

    In half precision cells and values carry a shared power-of-two scale, and what rounding cut
    off stays in the memory. Buckets and signs are drawn anew in every step.
    A digest of C rides in round 2: if ranks chose differently, all raise `RankMismatchError`.
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
        self._prepare()

    def _prepare(self) -> None:
        """Sizes, empty tables and fresh hashes for the coming step."""
        plan = self._planner(self.layout, self.step)
        seed = (self._seed << 32) + self.step
        if plan is not None and plan != self._plan:
            device = self.gradient.device
            self._carried, self._fresh = (
                CountSketch(self.layout.compressed, plan.rows, plan.cols, seed, device=device) for _ in range(2)
            )
            cells = plan.rows * plan.cols
            self._message = torch.zeros(wire.HEADER + cells + self.layout.dense, dtype=self._dtype, device=device)
            lanes = wire.HEADER + wire.DIGEST_BITS + plan.candidates
            self._answer = torch.zeros(lanes, dtype=self._dtype, device=device)
        elif plan is not None:
            self._carried.reset(seed)
            self._fresh.reset(seed)
        self._plan = plan

    def _is_dense_step(self) -> bool:
        return self._plan is None

    def _on_submit(self, start: int, stop: int) -> None:
        if self._plan is None or start >= self.layout.compressed:
            return
        with self.stats.phase("sketch"):
            self._fresh.add(self.gradient[start:stop], start)
            self.memory.sketch_carried(self._carried, start, stop)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._prepare()

    def _send_selected(self, clip: float, finite: bool) -> bool:
        plan, memory = self._plan, self.memory
        assert plan is not None
        dense = slice(self.layout.compressed, self.layout.total)
        with self.stats.phase("sketch"):
            self._carried.table.add_(self._fresh.table, alpha=memory.gain * clip)
            dense_values = memory.computed(self.gradient, clip, dense)
        dense_left = self._sum_tables(dense_values, finite)
        if dense_left is None:
            self._chosen = None
            return False
        with self.stats.phase("select"):
            candidates, estimates = self._carried.top_k(plan.candidates)
            computed = memory.computed(self.gradient, clip, candidates)
        sums, left = self._sum_exact(candidates, computed, float(estimates.abs().max()))
        with self.stats.phase("memory"):
            if plan.k < plan.candidates:
                kept = torch.sort(sums.abs(), descending=True, stable=True).indices[: plan.k]
                candidates, sums, left = candidates[kept], sums[kept], left[kept]
            memory.absorb(self.gradient, clip)
            memory.keep(dense, dense_left, mask=False)
            memory.keep(candidates, left, mask=True)
            self._write_update(candidates, sums)
        return True

    def _sum_tables(self, dense_values: Tensor, finite: bool) -> Tensor | None:
        """Round 1. Leaves the summed table in ``_carried`` and the dense update in place.

        Returns what rounding left behind of the dense values, or None if some rank is not finite.
        """
        ranks, cells = self.comm.size, self._carried.table.view(-1)
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

    def _sum_exact(self, candidates: Tensor, computed: Tensor, largest: float) -> tuple[Tensor, Tensor]:
        """Round 2. The candidates' sums over the ranks, and what rounding left behind here."""
        ranks, message = self.comm.size, self._answer
        scale = wire.shared_scale(largest / ranks, ranks, message.dtype)
        digest = message[wire.HEADER : wire.HEADER + wire.DIGEST_BITS]
        lanes = message[wire.HEADER + wire.DIGEST_BITS :]
        with self.stats.phase("exchange"):
            wire.write_header(message, True)
            wire.write_digest(digest, candidates)
            wire.pack(lanes, computed.clone(), scale, ranks)
            left = computed - wire.unpack(lanes, scale, torch.empty_like(computed))
            self.comm.allreduce(message, self._name("values"))
        if not wire.digests_agree(digest, message[1]):
            raise RankMismatchError(
                f"hvd_sketch: in step {self.step} the ranks selected different coordinates from the same sum, seen "
                f"on rank {self.comm.rank} and all others. The backend's allreduce does not give all ranks the same "
                "bits, or they run different builds: use one build of hvd_sketch and PyTorch on all ranks, and a "
                "deterministic allreduce algorithm"
            )
        return wire.unpack(lanes, scale, torch.empty_like(computed)), left

    def _rescale(self, largest_cell: float, largest_dense: float) -> None:
        """Scales of the next step's half-precision messages, from means that all ranks know; none from zeros."""
        if not self._all_present:
            return
        ranks = self.comm.size
        known = largest_cell > 0.0 and (largest_dense > 0.0 or not self.layout.dense)
        self._cell_scale = wire.shared_scale(largest_cell, ranks, self._dtype) if known else None
        self._dense_scale = wire.shared_scale(largest_dense, ranks, self._dtype) if known else None

    def _write_update(self, chosen: Tensor, sums: Tensor) -> None:
        if self._chosen is None:
            self.update[: self.layout.compressed].zero_()
        else:
            self.update[self._chosen] = 0.0
        values = sums * (1.0 / self._mean_divisor())
        self.update[chosen] = values
        self._chosen = chosen
        norm = self._carried.l2_norm()
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
