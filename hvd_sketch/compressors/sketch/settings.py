"""The settings of SketchedSGD."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch.compressors.base import Bucketed
from hvd_sketch.compressors.sketch.exchange import SketchExchange
from hvd_sketch.compressors.sketch.plan import Shares, SketchPlan, sketch_plan
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange, Setting
from hvd_sketch.layout import DensePredicate, Layout

_SHARE, _SHARE_IN_TURN = 0.75, 0.2
_IN_TURN_AHEAD = 0.75


@dataclass(frozen=True, eq=False, kw_only=True)
class Sketch(Bucketed):
    """SketchedSGD: find the heavy coordinates of the sum by a Count Sketch, then fetch them exactly.

    Sends ``rows * cols`` cells and ``oversampling * k`` values in two allreduces, whatever the
    number of ranks. The first of several buckets travel while backward computes the rest.
    Source: Ivkin et al., arXiv 1903.04488.

    Attributes:
        rows: rows of the table, odd.
        cols, k: sizes by hand, both or none; then ``ratio`` and the schedule do not apply.
        table_share: share of the bytes spent on the table, the rest on exact values; 0.75, or 0.2 with ``in_turn``.
        in_turn: share of the exact values that every coordinate has in turn, light ones too, so that none waits
            for more than ``2 / (share of the coordinates sent in turn)`` steps; the others are the heaviest's.
            0, for the heaviest alone, is as published, and so is what ``cols`` and ``k`` ask for. None for 0.75 where
            gradients are anticipated, and 0 elsewhere: what is sent because it is its turn is old, and without a step
            ahead that did more harm than good.
        oversampling: candidates fetched for each one applied (P in the paper).
        half: cells and values travel as float16, values on more than 128 ranks as float32; what is rounded off
            stays in the memory.
        seed: of the hash functions; equal on all ranks.
    """

    rows: int = 3
    cols: int | None = None
    k: int | None = None
    table_share: float | None = None
    in_turn: float | None = None
    oversampling: float = 1.0
    half: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cols is None) != (self.k is None):
            raise ConfigurationError("give both cols and k, or neither and a ratio")
        if self.rows < 1:
            raise ConfigurationError(f"rows must be at least 1, got {self.rows}")
        if self.cols is not None and self.k is not None:
            SketchPlan(self.rows, self.cols, self.k, self.k)
        if self.table_share is not None and not 0.0 < self.table_share < 1.0:
            raise ConfigurationError(f"table_share must be between 0 and 1, got {self.table_share}")
        if not 0.0 <= self._in_turn < 1.0:
            raise ConfigurationError(f"in_turn must be at least 0 and below 1, got {self.in_turn}")
        if not self.oversampling >= 1.0:
            raise ConfigurationError(f"oversampling must be at least 1, got {self.oversampling}")

    def layout(self, named_parameters: Iterable[tuple[str, Tensor]], is_dense: DensePredicate | None = None) -> Layout:
        """As for every `Compressor`; sizes and ratio must fit it."""
        layout = super().layout(named_parameters, is_dense)
        if self.k is not None and self.k > layout.compressed:
            raise ConfigurationError(f"k={self.k} exceeds the {layout.compressed} compressed parameters; lower k")
        if self.k is None:
            ratio = self.ratio if self.schedule is None else self.ratio_at(0)
            if ratio > 1.0:
                self.fit(layout, ratio, 1)
        return layout

    @property
    def wants_anticipation(self) -> bool:
        """Not with sizes by hand, which are taken as published, unless it is asked for."""
        return super().wants_anticipation and (self.cols is None or self.anticipate is True)

    def parts(self) -> int:
        """As many as there are buckets."""
        return self.buckets

    def plan(self, layout: Layout, step: int, ranks: int) -> SketchPlan | None:
        """The sizes given by hand, or those that the ratio of the step allows."""
        if self.cols is not None and self.k is not None:
            return SketchPlan(self.rows, self.cols, self.k, min(int(self.k * self.oversampling), layout.compressed))
        plan: SketchPlan | None = super().plan(layout, step, ranks)
        return plan

    def fit(self, layout: Layout, ratio: float, ranks: int) -> SketchPlan:
        """See `sketch_plan`."""
        table = self.table_share or (_SHARE_IN_TURN if self._in_turn else _SHARE)
        return sketch_plan(
            layout, ratio, ranks, self._dtype, Shares(self.rows, table, self._in_turn, self.oversampling)
        )

    def build(self, setting: Setting) -> Exchange:
        """A `SketchExchange`."""
        return SketchExchange(setting, self.seed, self._dtype)

    @property
    def _in_turn(self) -> float:
        if self.in_turn is None:
            return _IN_TURN_AHEAD if self.anticipate else 0.0
        return self.in_turn

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if self.half else torch.float32
