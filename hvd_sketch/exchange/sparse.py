"""What exchanges share that send the dense part in an allreduce and chosen coordinates beside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import grid, wire
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.intake import Factor, Finite
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.exchange.update import Part
from hvd_sketch.grid import Grid
from hvd_sketch.saved import Form


def dense_nbytes(count: int, ranks: int, dtype: torch.dtype) -> int:
    """Bytes of the message that carries so many dense values, as float32 or, where that serves, float16."""
    return grid.itemsize(ranks, dtype) * (wire.HEADER + grid.lanes(count, ranks, dtype))


class SparseExchange(Exchange):
    """First the dense part: an allreduce of ``dense + 4`` values; then what a subclass sends of the others.

    In a step that some rank does not take part in, because it has joined, nothing can be gathered: then the others
    are sent whole, in an allreduce of ``compressed`` float32 values.

    In half precision the values travel on a `Grid`; what is rounded off for it stays in the memory.

    Args:
        setting: as for every exchange.
        dtype: of the dense values on the wire, float32 or float16.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(setting)
        self._grid = Grid(setting.layout.dense, dtype)
        self._dense = slice(self.layout.compressed, self.layout.total)

    @abstractmethod
    def send_chosen(self, plan: Any) -> list[Part]:
        """Send coordinates of the memory, which has the step's gradient, and keep the rest.

        Returns:
            the update of the compressed part, the same on all ranks.
        """

    def send(self, plan: Any, clip: Factor, finite: Finite) -> bool:
        """The dense part, then the chosen coordinates."""
        summed = self._sum_dense(clip, finite)
        if summed is None:
            return False
        sent = self.send_chosen(plan) if self.rounds.all_present else self._send_whole()
        self.hold(*sent, Part(self._dense, summed.mul_(1.0 / self.divisor)))
        return True

    def _send_whole(self) -> list[Part]:
        """All compressed coordinates."""
        where = slice(0, self.layout.compressed)
        values = self.memory.residual[where].clone()
        self.memory.keep(where, 0.0, mask=True)
        with self.stats.phase("exchange"):
            self.comm.allreduce(values, self.rounds.name_of("whole"))
        self.stats.captured_energy = 1.0
        return [Part(where, values.mul_(1.0 / self.divisor))]

    def _sum_dense(self, clip: Factor, finite: Finite) -> Tensor | None:
        """Sum the dense part, and take the gradient into the memory; None, and nothing done, when a rank says so."""
        computed = self.memory.computed(self.gradient, clip, self._dense)
        lanes, dtype = self._grid.lanes(self.comm.size), self._grid.dtype(self.comm.size)
        message = torch.empty(wire.HEADER + lanes, dtype=dtype, device=self.gradient.device)
        sent = self._grid.put(message[wire.HEADER :], computed, self.comm)
        if not self.rounds.sum(message, finite, "dense"):
            return None
        self.memory.absorb(self.gradient, clip)
        self.memory.keep(self._dense, computed.sub_(sent), mask=False)
        return self._grid.take(message[wire.HEADER :], self.layout.dense, self.comm, learn=self.rounds.all_present)

    def own_state(self) -> dict[str, Any]:
        """The scales of the dense values."""
        return {"dense_scales": self._grid.scales}

    def own_form(self) -> Form:
        """A scale a block."""
        return {"dense_scales": self._grid.form(fixed=True)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._grid.restore(state["dense_scales"], self.gradient.device)
