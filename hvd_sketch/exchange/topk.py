"""Local top-k with allgather: the baseline that most sparsification papers use."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


class TopKPlanner(Protocol):
    """Pairs a rank sends in a step, or None to send everything; equal on all ranks."""

    def __call__(self, layout: Layout, step: int, ranks: int) -> int | None: ...


class TopKExchange(Exchange):
    """Each rank sends the k largest coordinates of its own memory, index and exact value.

    Sends the dense part in an allreduce of ``dense + 4`` floats, and k pairs of (int32, float32)
    in an allgather, whose bytes grow with the number of ranks. Needs fewer than 2^31
    compressed coordinates. Source: Aji and Heafield, "Sparse Communication for Distributed
    Gradient Descent" (EMNLP 2017).
    """

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        settings: str,
        planner: TopKPlanner,
        *,
        average: bool,
        clip_norm: float | None,
        momentum: Momentum | None,
        device: torch.device,
    ) -> None:
        super().__init__(
            layout, comm, settings, average=average, clip_norm=clip_norm, momentum=momentum, device=device
        )
        if layout.compressed >= 2**31:
            raise ConfigurationError(
                f"topk: indices are 32-bit, the model has {layout.compressed} compressed coordinates; use sketch"
            )
        self._planner = planner

    def _is_dense_step(self) -> bool:
        return self._planner(self.layout, self.step, self.comm.size) is None

    def _send_selected(self, clip: float, finite: bool) -> bool:
        k = self._planner(self.layout, self.step, self.comm.size)
        assert k is not None
        dense = slice(self.layout.compressed, self.layout.total)
        message = self.gradient.new_empty(wire.HEADER + self.layout.dense)
        message[wire.HEADER :] = self.memory.computed(self.gradient, clip, dense)
        if not self._sum(message, finite, "dense"):
            return False
        with self.stats.phase("select"):
            self.memory.absorb(self.gradient, clip)
            residual = self.memory.residual[: self.layout.compressed]
            chosen = residual.abs().topk(k, sorted=False).indices
            values = residual[chosen]
            pairs = torch.cat([chosen.to(torch.int32), values.view(torch.int32)])
            self.stats.note_captured(values, residual)
        with self.stats.phase("exchange"):
            gathered = self.comm.allgather(pairs, self._name("pairs"))
        with self.stats.phase("memory"):
            self.memory.keep(dense, 0.0, mask=False)
            self.memory.keep(chosen, 0.0, mask=True)
            self._write_update(gathered, message[wire.HEADER :])
        return True

    def _write_update(self, gathered: Tensor, dense_sum: Tensor) -> None:
        indices, values = gathered.view(self.comm.size, 2, -1).unbind(1)
        self.update[: self.layout.compressed].zero_()
        for rank_indices, rank_values in zip(indices, values, strict=True):
            self.update.index_add_(0, rank_indices.to(torch.int64), rank_values.contiguous().view(torch.float32))
        self.update[self.layout.compressed :] = dense_sum
        self.update.mul_(1.0 / self._mean_divisor())
