"""The sizes of a sketched step: of the table, and of the values that are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hvd_sketch import wire
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.budget import unreachable
from hvd_sketch.layout import Layout


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


def sketch_plan(
    layout: Layout,
    ratio: float,
    *,
    rows: int,
    table_share: float,
    in_turn: float,
    oversampling: float,
    lane_bytes: int,
) -> SketchPlan:
    """Spend ``4 * total / ratio`` bytes: dense part first, then table and exact values by share.

    An allreduce moves every byte of its message alike, so the ratio of messages is the ratio
    of bytes sent; each bucket has its headers. Of the values a part is of the comb, all others of
    candidates, of which k is capped at the number of compressed coordinates.

    Raises:
        ConfigurationError: when the dense part alone, or a table of one tile, does not fit.
    """
    overhead = len(layout.buckets) * (2 * wire.HEADER + wire.DIGEST_BITS) + layout.dense
    lanes = int(4 * layout.total / ratio) // lane_bytes - overhead
    cols = int(lanes * table_share) // rows
    values = lanes - rows * cols
    stride = -(-layout.compressed // int(values * in_turn)) if values * in_turn >= 1 else 0
    candidates = values - (sum(-(-size // stride) for size in layout.sizes) if stride else 0)
    k = int(candidates / oversampling)
    if cols < 1 or k < 1:
        raise unreachable(layout, ratio, overhead + 2 * rows, lane_bytes)
    k = min(k, layout.compressed)
    return SketchPlan(rows, cols, k, min(candidates, layout.compressed), stride)
