"""The sizes of a sketched step: of the table, and of the values that are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from hvd_sketch import grid, wire
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.budget import unreachable
from hvd_sketch.layout import Layout
from hvd_sketch.sparse.comb import most_of


@dataclass(frozen=True)
class SketchPlan:
    """Sizes of a sketched step: a table of rows by cols, candidates fetched, k of them applied.

    Beside them every ``stride``-th coordinate is sent, see `comb`; none if it is 0.
    """

    rows: int
    cols: int
    k: int
    candidates: int
    stride: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "k"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"sketch: {name} must be at least 1, got {getattr(self, name)}")

    def split(self, sizes: Sequence[int]) -> list[SketchPlan]:
        """The plans of buckets of so many coordinates each: columns, k and candidates in proportion."""
        stops = [0, *accumulate(sizes)]
        shares = (
            [max(1, whole * stop // stops[-1] - whole * start // stops[-1]) for start, stop in pairwise(stops)]
            for whole in (self.cols, self.k, self.candidates)
        )
        return [SketchPlan(self.rows, cols, k, fetched, self.stride) for cols, k, fetched in zip(*shares, strict=True)]


@dataclass(frozen=True)
class Shares:
    """How a step's bytes are divided.

    Attributes:
        rows: of the table.
        table: share of the bytes that the table has.
        in_turn: share of the values that are of the comb.
        oversampling: candidates for each one applied.
    """

    rows: int
    table: float
    in_turn: float
    oversampling: float


def sketch_plan(layout: Layout, ratio: float, ranks: int, dtype: torch.dtype, shares: Shares) -> SketchPlan:
    """Spend ``4 * total / ratio`` bytes: dense part first, then table and exact values by share.

    An allreduce moves every byte of its message alike, so the ratio of messages is the ratio
    of bytes sent; each bucket has its headers. Of the values a part is of the comb, all others of
    candidates, of which k is capped at the number of compressed coordinates. Values, exact ones and dense ones, are
    in float32 where ranks are too many for a `grid`.

    Raises:
        ConfigurationError: when the dense part alone, or a table of one tile, does not fit.
    """
    cell, value = dtype.itemsize, grid.itemsize(ranks, dtype)
    headers = (cell + value) * wire.HEADER
    overhead, dense = len(layout.buckets) * headers, value * grid.lanes(layout.dense, ranks, dtype)
    left = int(4 * layout.total / ratio) - overhead - dense
    cols = int(left * shares.table) // (cell * shares.rows)
    values = (left - cell * shares.rows * cols) // value
    stride = -(-layout.compressed // int(values * shares.in_turn)) if values * shares.in_turn >= 1 else 0
    candidates = values - sum(grid.lanes(most_of(size, stride), ranks, dtype) for size in layout.sizes)
    k = int(candidates / shares.oversampling)
    if cols < 1 or k < 1:
        raise unreachable(layout, ratio, dense, overhead + cell * shares.rows + value)
    k = min(k, layout.compressed)
    return SketchPlan(shares.rows, cols, k, min(candidates, layout.compressed), stride)
