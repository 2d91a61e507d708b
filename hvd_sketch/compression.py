"""`Compression`: the namespace that stands in for ``hvd.Compression``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_sketch import stock
from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange, ShardedExchange, SketchExchange, TopKExchange
from hvd_sketch.exchange.plan import SketchPlan, sharded_plan, sketch_plan, topk_plan
from hvd_sketch.layout import Layout, small_or_named
from hvd_sketch.memory import Momentum
from hvd_sketch.schedule import AdaptiveSchedule, Schedule, warmup


class NoCompression:
    """Send gradients as they are; the same as Horovod's own ``Compression.none``."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, None]:
        """Return the tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: None) -> Tensor:
        """Return the tensor itself."""
        return tensor


class HalfPrecision:
    """Send floating-point gradients as float16; the same as Horovod's own ``Compression.fp16``."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype]:
        """Cast to float16; other dtypes pass."""
        return (tensor.half() if tensor.dtype.is_floating_point else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype) -> Tensor:
        """Cast back to the dtype that came in."""
        return tensor.to(ctx) if ctx.is_floating_point else tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Sparsifier(ABC):
    """What all sparsifying compressors share; also a compressor for *stock* Horovod.

    Under ``horovod.torch.DistributedOptimizer`` the whole exchange runs when the first gradient
    of a step is decompressed, see `hvd_sketch.stock`; under `hvd_sketch.DistributedOptimizer`
    it is built directly.

    Attributes:
        ratio: bytes a dense float32 exchange sends over the bytes this one sends, above 1.
        clip_norm: each rank's gradient is scaled down to this L2 norm before it enters the
            memory; None to leave it. An unclipped spike stays in the memory for many steps.
        warmup_steps: the ratio grows from 1 to ``ratio`` in four stages over so many steps.
        schedule: the ratio of each step, in place of ``ratio`` and ``warmup_steps``; must give
            the same numbers on all ranks.
        momentum: momentum correction, for an inner optimizer that has none.
        dense_below: tensors of fewer elements, and all 1-D ones, are sent whole.
        exclude: shell-style patterns of parameter names that are sent whole as well.
    """

    ratio: float = 40.0
    clip_norm: float | None = 1.0
    warmup_steps: int = 100
    schedule: Schedule | None = field(default=None, repr=False)
    momentum: Momentum | None = None
    dense_below: int = 1024
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.ratio > 1.0:
            raise ConfigurationError(
                f"ratio must be above 1, got {self.ratio}; for no compression use Compression.none"
            )
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ConfigurationError(f"clip_norm must be above 0 or None, got {self.clip_norm}")
        if self.warmup_steps < 0:
            raise ConfigurationError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if not isinstance(self.exclude, tuple):
            raise ConfigurationError(f"exclude must be a tuple of patterns, got {self.exclude!r}")

    def layout(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Layout:
        """Which coordinates of these parameters are compressed and which are sent whole.

        Raises:
            ConfigurationError: when the parameters are unfit, or none is left to compress.
        """
        layout = Layout.of(named_parameters, small_or_named(self.dense_below, self.exclude))
        if layout.compressed == 0:
            raise ConfigurationError(
                f"nothing to compress: all {layout.total} parameters are 1-D, smaller than "
                f"dense_below={self.dense_below} or excluded; lower dense_below or use Compression.none"
            )
        return layout

    def exchange(
        self,
        layout: Layout,
        comm: Communicator,
        *,
        average: bool,
        device: torch.device,
        momentum: Momentum | None = None,
    ) -> Exchange:
        """The exchange of one optimizer; ``momentum`` takes the place of the compressor's own.

        A schedule that learns from the steps, see `hvd_sketch.schedule.AdaptiveSchedule`, is told of each of them.
        """
        exchange = self._exchange(layout, comm, average=average, device=device, momentum=momentum or self.momentum)
        if isinstance(self.schedule, AdaptiveSchedule):
            self.schedule.attach(exchange)
        return exchange

    @abstractmethod
    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange: ...

    def compress(self, tensor: Tensor) -> tuple[Tensor, stock.Ticket]:
        """Stock Horovod's first call: note the gradient, hand out a one-element token to reduce."""
        return stock.compress(self, tensor)

    def decompress(self, tensor: Tensor, ctx: stock.Ticket | None) -> Tensor:
        """Stock Horovod's second call: the first one of a step runs the exchange."""
        return stock.decompress(self, tensor, ctx)

    def ratio_at(self, step: int) -> float:
        """The compression ratio of a step; 1 means that everything is sent."""
        schedule = self.schedule or warmup(self.ratio, self.warmup_steps)
        ratio = schedule(step)
        if not ratio >= 1.0:
            raise ConfigurationError(f"schedule gave ratio {ratio} in step {step}; it must be at least 1")
        return ratio


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
        seed: of the hash functions; equal on all ranks.
    """

    rows: int = 3
    cols: int | None = None
    k: int | None = None
    table_share: float = 0.75
    oversampling: float = 1.0
    half: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cols is None) != (self.k is None):
            raise ConfigurationError("give both cols and k, or neither and a ratio")
        if self.rows < 1:
            raise ConfigurationError(f"rows must be at least 1, got {self.rows}")
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
    """

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        return TopKExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            device=device,
        )

    def _plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        ratio = self.ratio_at(step)
        return None if ratio <= 1.0 else topk_plan(layout, ratio, ranks, pair_bytes=8, lane_bytes=4)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded(Sparsifier):
    """Two-way top-k over owners: compressed up and down, eight-bit values; see `ShardedExchange`.

    Its bytes do not grow with the number of ranks, and every rank gets its own heavy coordinates
    through to their owner, where they are summed before the second selection.
    """

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        return ShardedExchange(
            layout,
            comm,
            repr(self),
            self._plan,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            device=device,
        )

    def _plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        ratio = self.ratio_at(step)
        return None if ratio <= 1.0 else sharded_plan(layout, ratio, ranks)


class Compression:
    """Optional gradient compression algorithms, by name.

    ``none`` and ``fp16`` are Horovod's; ``sketch(ratio=…)``, ``topk(ratio=…)`` and ``sharded(ratio=…)`` make a
    compressor for one optimizer.
    """

    none = NoCompression
    fp16 = HalfPrecision
    sketch = Sketch
    topk = TopK
    sharded = Sharded
