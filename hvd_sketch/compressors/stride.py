"""A random comb of coordinates, the same on all ranks: no indices, no selection, one allreduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_sketch import wire
from hvd_sketch.compressors.base import Sparsifier
from hvd_sketch.exchange import Exchange, Part, Setting
from hvd_sketch.exchange.budget import unreachable
from hvd_sketch.exchange.intake import Factor, Finite
from hvd_sketch.layout import Layout
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.comb import comb


@dataclass(frozen=True, eq=False, kw_only=True)
class Stride(Sparsifier):
    """A random comb of coordinates, the same on all ranks; see `StrideExchange`.

    Attributes:
        seed: of the offsets; equal on all ranks.
        anticipate: no, unless it is asked for.
    """

    seed: int = 0
    anticipate: bool | None = False

    def fit(self, layout: Layout, ratio: float, ranks: int) -> int:
        """Every which coordinate to send, so that ``4 * total / ratio`` bytes hold the dense part as well.

        Raises:
            ConfigurationError: when not one coordinate fits.
        """
        lanes = int(layout.total / ratio) - wire.HEADER - layout.dense
        if lanes < 1:
            raise unreachable(layout, ratio, 4 * layout.dense, 4 * (wire.HEADER + 1))
        return -(-layout.compressed // lanes)

    def build(self, setting: Setting) -> Exchange:
        """A `StrideExchange`."""
        return StrideExchange(setting, self.seed)


class StrideExchange(Exchange):
    """Every R-th coordinate, from an offset drawn by (seed, step), which all ranks share.

    No coordinate waits longer than 2 R steps, see `comb`. Sends ``dense + compressed / R`` float32
    values in one allreduce. It ignores how heavy a coordinate is; its use is where a linear, shared
    pattern is asked for, as in CSER, whose globally randomised blocks it stands in for with blocks of
    one coordinate.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__(setting)
        self._seed = seed

    def send(self, plan: int, clip: Factor, finite: Finite) -> bool:
        """Sum the dense part and every ``plan``-th coordinate."""
        chosen = comb(self.layout.compressed, plan, self.step, self._seed)
        dense = slice(self.layout.compressed, self.layout.total)
        values = self.memory.computed(self.gradient, clip, chosen)
        header = self.gradient.new_empty(wire.HEADER)
        message = torch.cat([header, self.memory.computed(self.gradient, clip, dense), values])
        if not self.rounds.sum(message, finite, "comb"):
            return False
        with self.stats.phase("memory"):
            self.memory.absorb(self.gradient, clip)
            self.memory.keep(dense, 0.0, mask=False)
            self.memory.keep(chosen, 0.0, mask=True)
            self.stats.note_sent(torch.linalg.vector_norm(values), self.memory.residual[: self.layout.compressed])
            lanes = message[wire.HEADER :].mul_(1.0 / self.divisor)
            places = Chosen(torch.empty(0, dtype=torch.int64, device=message.device), chosen)
            self.hold(
                Part(slice(0, self.layout.compressed), lanes[self.layout.dense :], places),
                Part(dense, lanes[: self.layout.dense]),
            )
        return True
