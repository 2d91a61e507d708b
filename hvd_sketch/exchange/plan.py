"""From one number, the ratio, to the sizes of a step's messages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hvd_sketch import wire
from hvd_sketch.codec import SparseCodec
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout

_LEAST_PAIRS = 8 * SparseCodec.LEVEL_BYTES
"""Of a part of a shard: a tenth of the code's bytes are levels then."""


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
        raise ConfigurationError(_unreachable(layout, ratio, overhead + 2 * rows, lane_bytes))
    k = min(k, layout.compressed)
    return SketchPlan(rows, cols, k, min(candidates, layout.compressed), stride)


def topk_plan(layout: Layout, ratio: float, ranks: int, *, pair_bytes: int, lane_bytes: int) -> int:
    """How many (value, index) pairs each rank may send.

    An allgather sends ``(W-1)`` times a rank's pairs where an allreduce sends ``2 (W-1)/W`` times
    its message, so at equal bytes k falls with the number of ranks W::

        k = 2 (4 total / ratio - dense bytes) / (W * pair bytes)

    Raises:
        ConfigurationError: when not one pair fits.
    """
    overhead = wire.HEADER + layout.dense
    k = int(2 * (4 * layout.total / ratio - lane_bytes * overhead) / (ranks * pair_bytes))
    if k < 1:
        raise ConfigurationError(_unreachable(layout, ratio, overhead + ranks * pair_bytes, lane_bytes))
    return min(k, layout.compressed)


def shard_codes(compressed: int, ranks: int, count: int, buckets: int) -> list[tuple[slice, SparseCodec]]:
    """Cut the vector, and so every shard, into at most so many parts; each has a code for its share of the pairs.

    A part is a range of coordinates that begins with one of the first rank's and has as many of every rank,
    the last part perhaps one less of some. Parts are no smaller than what makes a code's levels worth their bytes.
    """
    rows = -(-compressed // ranks)
    buckets = max(1, min(buckets, count // _LEAST_PAIRS))
    stops = [rows * number // buckets for number in range(buckets + 1)]
    parts = []
    for start, stop in pairwise(stops):
        where = slice(start * ranks, min(stop * ranks, compressed))
        share = count * stop // rows - count * start // rows
        parts.append((where, SparseCodec(stop - start, min(share, (where.stop - where.start) // ranks))))
    return parts


def sharded_plan(layout: Layout, ratio: float, ranks: int, *, lane_bytes: int, buckets: int = 1) -> int:
    """How many pairs of a `SparseCodec` a rank sends to each owner, and an owner to everybody.

    Up and down together send ``2 (W-1) codes' bytes`` where a dense allreduce sends ``2 (W-1)/W 4 total``,
    so the codes of all buckets may have ``(4 total / ratio - dense bytes) / W`` bytes.

    Raises:
        ConfigurationError: when not one pair fits.
    """
    dense_bytes = lane_bytes * (wire.HEADER + layout.dense)
    budget = int((4 * layout.total / ratio - dense_bytes) / ranks)
    fitting = range(1, layout.compressed // ranks + 1)  # the least shard

    def nbytes(pairs: int) -> int:
        return sum(codec.nbytes for _, codec in shard_codes(layout.compressed, ranks, pairs, buckets))

    count = bisect_right(fitting, budget, key=nbytes)
    if count < 1:
        raise ConfigurationError(_unreachable(layout, ratio, (dense_bytes + ranks * nbytes(1)) // 4, 4))
    return count


def stride_plan(layout: Layout, ratio: float) -> int:
    """Every which coordinate to send, so that ``4 * total / ratio`` bytes hold the dense part as well.

    Raises:
        ConfigurationError: when not one coordinate fits.
    """
    overhead = wire.HEADER + layout.dense
    lanes = int(layout.total / ratio) - overhead
    if lanes < 1:
        raise ConfigurationError(_unreachable(layout, ratio, overhead + 1, 4))
    return -(-layout.compressed // lanes)


def _unreachable(layout: Layout, ratio: float, least_lanes: int, lane_bytes: int) -> str:
    reachable = 4 * layout.total / (lane_bytes * least_lanes)
    return (
        f"ratio={ratio:g} cannot be reached: {layout.dense} of the {layout.total} parameters are 1-D, small or "
        f"excluded and travel whole in every step; at most about {reachable:.1f} is possible. "
        "Lower the ratio, or lower dense_below, or exclude fewer parameters"
    )
