"""`Compression`: the namespace that stands in for ``hvd.Compression``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hvd_sketch.codec import SparseCodec
from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressor import Compressor, Sparsifier
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import (
    Exchange,
    PowerSGDExchange,
    ShardedExchange,
    SketchExchange,
    StrideExchange,
    TopKExchange,
)
from hvd_sketch.exchange.plan import SketchPlan, sharded_plan, sketch_plan, stride_plan, topk_plan
from hvd_sketch.exchange.powersgd import matrix_shape
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum
from hvd_sketch.uncompressed import HalfPrecision, NoCompression


@dataclass(frozen=True, eq=False, kw_only=True)
class Sketch(Sparsifier):
    """SketchedSGD: find the heavy coordinates of the sum by a Count Sketch, then fetch them exactly.

    Sends ``rows * cols`` cells and ``oversampling * k`` values in two allreduces, whatever the
    number of ranks. Source: Ivkin et al., arXiv 1903.04488.

    Attributes:
        rows: rows of the table, odd.
        cols, k: sizes by hand, both or none; then ``ratio`` and the schedule do not apply.
        table_share: share of the bytes spent on the table, the rest on exact values.
        oversampling: candidates fetched for each one applied (P in the paper).
        half: cells and values travel as float16; what rounding cuts off stays in the memory.
        buckets: parts of the vector, exchanged one behind the other: the first ones while backward still
            computes the rest, and each while others are sketched or selected. Every bucket has its share of k.
        seed: of the hash functions; equal on all ranks.
    """

    rows: int = 3
    cols: int | None = None
    k: int | None = None
    table_share: float = 0.75
    oversampling: float = 1.0
    half: bool = True
    buckets: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_buckets(self.buckets)
        if (self.cols is None) != (self.k is None):
            raise ConfigurationError("give both cols and k, or neither and a ratio")
        if self.rows < 1:
            raise ConfigurationError(f"rows must be at least 1, got {self.rows}")
        if self.cols is not None and self.k is not None:
            SketchPlan(self.rows, self.cols, self.k, self.k)
        if not 0.0 < self.table_share < 1.0:
            raise ConfigurationError(f"table_share must be between 0 and 1, got {self.table_share}")
        if not self.oversampling >= 1.0:
            raise ConfigurationError(f"oversampling must be at least 1, got {self.oversampling}")

    def layout(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Layout:
        layout = super().layout(named_parameters)
        if self.k is not None and self.k > layout.compressed:
            raise ConfigurationError(f"k={self.k} exceeds the {layout.compressed} compressed parameters; lower k")
        if self.k is None:
            self._sized(layout, self.ratio if self.schedule is None else self.ratio_at(0))
        return layout

    def _buckets(self) -> int:
        return self.buckets

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        return SketchExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            seed=self.seed,
            dtype=torch.float16 if self.half else torch.float32,
            device=device,
            clip_norm=self.clip_norm,
            momentum=momentum,
        )

    def _plan(self, layout: Layout, step: int) -> SketchPlan | None:
        if self.cols is not None and self.k is not None:
            return SketchPlan(self.rows, self.cols, self.k, min(int(self.k * self.oversampling), layout.compressed))
        return self._sized(layout, self.ratio_at(step))

    def _sized(self, layout: Layout, ratio: float) -> SketchPlan | None:
        if ratio <= 1.0:
            return None
        return sketch_plan(
            layout,
            ratio,
            rows=self.rows,
            table_share=self.table_share,
            oversampling=self.oversampling,
            lane_bytes=2 if self.half else 4,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class TopK(Sparsifier):
    """Local top-k with allgather: every rank's own k largest coordinates; see `TopKExchange`.

    Its bytes grow with the number of ranks W, so at a given ratio k falls as 1/W.

    Attributes:
        half: the dense part travels as float16; what rounding cuts off stays in the memory.
    """

    half: bool = True

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        if self.schedule is None:  # fail now, not at the end of the warm-up
            self._plan(layout, self.warmup_steps, comm.size)
        return TopKExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            dtype=torch.float16 if self.half else torch.float32,
            device=device,
        )

    def _plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        ratio = self.ratio_at(step)
        return (
            None if ratio <= 1.0 else topk_plan(layout, ratio, ranks, pair_bytes=8, lane_bytes=2 if self.half else 4)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded(Sparsifier):
    """Two-way top-k over owners: compressed up and down, four-bit values; see `ShardedExchange`.

    Its bytes do not grow with the number of ranks, and every rank gets its own heavy coordinates
    through to their owner, where they are summed before the second selection.

    Attributes:
        dense_below: 0, so that 1-D tensors are compressed like the others: on small models they would
            take a large part of the bytes.
        half: the dense part travels as float16; what rounding cuts off stays in the memory.
        buckets: parts of every shard, exchanged one behind the other: each while others are selected or
            applied. Every part has its share of k.
    """

    dense_below: int = 0
    half: bool = True
    buckets: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_buckets(self.buckets)

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        if self.schedule is None:  # fail now, not at the end of the warm-up
            self._plan(layout, self.warmup_steps, comm.size)
        return ShardedExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            dtype=torch.float16 if self.half else torch.float32,
            device=device,
            buckets=self.buckets,
        )

    def _plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        ratio, lane_bytes = self.ratio_at(step), 2 if self.half else 4
        if ratio <= 1.0:
            return None
        return sharded_plan(layout, ratio, ranks, lane_bytes=lane_bytes, buckets=self.buckets)


@dataclass(frozen=True, eq=False, kw_only=True)
class PowerSGD(Compressor):
    """Low-rank averaging, the strongest rival of sparse updates for matrices; see `PowerSGDExchange`.

    Matrices that a rank-r product would not shrink are sent whole.

    Attributes:
        rank: of the product that stands for each matrix; the compression ratio follows from it.
        start_step: steps before this one are dense.
        seed: of the first right factors; equal on all ranks.
    """

    rank: int = 2
    start_step: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigurationError(f"rank must be at least 1, got {self.rank}")
        if self.start_step < 0:
            raise ConfigurationError(f"start_step must be at least 0, got {self.start_step}")

    def is_dense(self, name: str, parameter: Tensor) -> bool:
        """Also true of a matrix that the product of two factors would not shrink."""
        if super().is_dense(name, parameter):
            return True
        n, m = matrix_shape(tuple(parameter.shape))
        return self.rank * (n + m) >= n * m

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        return PowerSGDExchange(
            layout,
            comm,
            repr(self),
            rank=self.rank,
            start_step=self.start_step,
            seed=self.seed,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            device=device,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Stride(Sparsifier):
    """A random comb of coordinates, the same on all ranks; see `StrideExchange`.

    Attributes:
        seed: of the offsets; equal on all ranks.
    """

    seed: int = 0

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        if self.schedule is None:  # fail now, not at the end of the warm-up
            self._plan(layout, self.warmup_steps)
        return StrideExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            seed=self.seed,
            clip_norm=self.clip_norm,
            momentum=momentum,
            device=device,
        )

    def _plan(self, layout: Layout, step: int) -> int | None:
        ratio = self.ratio_at(step)
        return None if ratio <= 1.0 else stride_plan(layout, ratio)


@dataclass(frozen=True, eq=False, kw_only=True)
class Auto(Sparsifier):
    """`Sharded`, unless ranks are too many for the model: then `Sketch`.

    Of all exchanges `Sharded` ended nearest to dense training, at every ratio and number of ranks
    that was measured, see docs/convergence.md. But it sends a code to every owner, whose 32 bytes
    of levels do not shrink. Where they would be more than the pairs', with more ranks than
    ``parameters / (16 ratio)``, a sketch still has the size of a sketch.
    """

    dense_below: int = 0

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        code = 4 * layout.total / self.ratio / comm.size
        member = Sharded(**settings) if code >= 2 * SparseCodec.LEVEL_BYTES else Sketch(**settings)
        return member._exchange(layout, comm, average=average, device=device, momentum=momentum)


def _check_buckets(buckets: int) -> None:
    if buckets < 1:
        raise ConfigurationError(f"buckets must be at least 1, got {buckets}")


class Compression:
    """Optional gradient compression algorithms, by name.

    ``none`` and ``fp16`` are Horovod's; ``auto(ratio=…)``, ``sharded(ratio=…)``, ``sketch(ratio=…)``,
    ``topk(ratio=…)``, ``stride(ratio=…)`` and ``powersgd(rank=…)`` make a compressor for one optimizer.
    """

    none = NoCompression
    fp16 = HalfPrecision
    auto = Auto
    sketch = Sketch
    topk = TopK
    sharded = Sharded
    stride = Stride
    powersgd = PowerSGD
