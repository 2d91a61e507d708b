"""Some coordinates of a vector now, the others in a later message: the sparsifiers of `Compression` as codes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.compressors import Auto, Sharded, Sparsifier, Stride, TopK
from hvd_sketch.compressors.base import Bucketed
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.budget import unreachable
from hvd_sketch.layout import Layout
from hvd_sketch.methods.server.codes import Code
from hvd_sketch.methods.server.message import HEADER
from hvd_sketch.schedules.base import AdaptiveSchedule
from hvd_sketch.sparse.codec import SparseCodec
from hvd_sketch.sparse.comb import comb
from hvd_sketch.sparse.heaviest import heaviest

_PAIR = 8  # bytes of an index (int32) and a value (float32)

Plan = Callable[[int], int | None]
"""How many coordinates the message number ``step`` has, or None for all."""


class SparseCode(Code):
    """``count`` (uint32), the dense part (float32), and ``count`` coordinates of the others.

    A count of 0 stands for the whole vector in float32, as in the first steps of a warm-up.
    """

    def __init__(self, layout: Layout, plan: Plan) -> None:
        self._layout, self._plan = layout, plan

    def encode(self, vector: Tensor, step: int) -> Tensor:
        count = self._plan(step)
        lanes = vector if count is None else vector[self._layout.compressed :]
        parts = [torch.tensor([count or 0], dtype=torch.int32, device="cpu"), _take(lanes, slice(None))]
        if count is not None:
            parts += self._choose(vector[: self._layout.compressed], count, step)
        return torch.cat([part.view(torch.uint8) for part in parts])

    def add(self, payload: Tensor, vector: Tensor) -> None:
        layout = self._layout
        count = int(_part(payload, 0, 4).view(torch.int32))
        if not 0 <= count <= layout.compressed:
            raise ValueError(f"{count} of {layout.compressed} coordinates")
        lanes = vector[layout.compressed :] if count else vector
        stop = 4 + 4 * lanes.numel()
        lanes.add_(_part(payload, 4, stop).view(torch.float32))
        chosen = payload[stop:]
        expected = self._chosen_bytes(count) if count else 0
        if chosen.numel() != expected:
            raise ValueError(f"{chosen.numel()} bytes, {count} coordinates take {expected}")
        if count:
            self._add_chosen(chosen, count, vector[: layout.compressed])

    @property
    def most_bytes(self) -> int:
        return 4 * self._layout.total + 64  # any ratio above 1 sends less

    @abstractmethod
    def _choose(self, vector: Tensor, count: int, step: int) -> list[Tensor]:
        """Parts of the payload for ``count`` coordinates, of which ``vector`` keeps the rest."""

    @abstractmethod
    def _chosen_bytes(self, count: int) -> int:
        """What they take."""

    @abstractmethod
    def _add_chosen(self, payload: Tensor, count: int, vector: Tensor) -> None: ...


class Pairs(SparseCode):
    """The heaviest coordinates: indices (int32) and exact values (float32)."""

    number = 1

    def _choose(self, vector: Tensor, count: int, step: int) -> list[Tensor]:
        rows = heaviest(vector.float(), count)
        return [rows.to(torch.int32), _take(vector, rows)]

    def _chosen_bytes(self, count: int) -> int:
        return _PAIR * count

    def _add_chosen(self, payload: Tensor, count: int, vector: Tensor) -> None:
        rows, values = payload[: 4 * count].view(torch.int32).long(), payload[4 * count :].view(torch.float32)
        _add(rows, values, vector)


class FourBits(SparseCode):
    """The heaviest coordinates by `SparseCodec`: packed indices and values of four bits."""

    number = 5  # 2 was of the code's first version

    def _choose(self, vector: Tensor, count: int, step: int) -> list[Tensor]:
        single = vector.float()
        rows = heaviest(single, count)
        code, decoded = SparseCodec(vector.numel(), count).encode(rows.unsqueeze(0), single[rows].unsqueeze(0))
        vector.index_add_(0, rows, decoded[0].to(vector.dtype), alpha=-1)
        return [code[0]]

    def _chosen_bytes(self, count: int) -> int:
        return SparseCodec(self._layout.compressed, count).nbytes

    def _add_chosen(self, payload: Tensor, count: int, vector: Tensor) -> None:
        rows, values, known = SparseCodec(vector.numel(), count).decode(payload.unsqueeze(0))
        if not known.all():
            raise ValueError(f"these {payload.numel()} bytes are no code of {count} of {vector.numel()} coordinates")
        _add(rows[0], values[0], vector)


class Comb(SparseCode):
    """Coordinates at equal distances, in turn, see `hvd_sketch.sparse.comb`: offset, distance, exact values."""

    number = 3

    def __init__(self, layout: Layout, strides: Plan, seed: int) -> None:
        super().__init__(layout, self._count)
        self._strides, self._seed = strides, seed

    def _choose(self, vector: Tensor, count: int, step: int) -> list[Tensor]:
        teeth = self._teeth(step)
        assert teeth is not None
        return [
            torch.tensor([teeth.start, teeth.step], dtype=torch.int32, device="cpu"),
            _take(vector, slice(teeth.start, teeth.stop, teeth.step)),
        ]

    def _chosen_bytes(self, count: int) -> int:
        return 8 + 4 * count

    def _add_chosen(self, payload: Tensor, count: int, vector: Tensor) -> None:
        start, stride = payload[:8].view(torch.int32).tolist()
        if not 0 <= start < stride or len(range(start, vector.numel(), stride)) != count:
            raise ValueError(f"{count} coordinates from {start} on at a distance of {stride}")
        vector[start::stride].add_(payload[8:].view(torch.float32))

    def _count(self, step: int) -> int | None:
        teeth = self._teeth(step)
        return None if teeth is None else len(teeth)

    def _teeth(self, step: int) -> range | None:
        stride, size = self._strides(step), self._layout.compressed
        return None if stride is None else range(*comb(size, stride, step, self._seed).indices(size))


def sparse_code(compression: Sparsifier, layout: Layout) -> Code:
    """The code that a compressor's settings ask for: those of ``topk``, ``sharded`` or ``auto``, and ``stride``.

    The ratio is that of one way: a dense vector's bytes over a message's.
    What they leave whole travels as float32.

    Raises:
        ConfigurationError: for a compressor that cannot choose from one vector alone, or a ratio out of reach.
    """
    if isinstance(compression.schedule, AdaptiveSchedule):
        raise ConfigurationError(
            f"schedule: {type(compression.schedule).__name__} learns from what all ranks exchange in a step, and "
            "a server has no such steps; give a ratio or a function of the message's number"
        )
    make, fit = _recipe(compression, layout)

    def count_at(step: int) -> int | None:
        ratio = compression.ratio_at(step)
        return None if ratio <= 1.0 else fit(ratio)

    if compression.schedule is None:
        count_at(compression.warmup_steps)  # fail now, not at the end of the warm-up
    return make(layout, count_at)


def _recipe(compression: Sparsifier, layout: Layout) -> tuple[Callable[..., Code], Callable[[float], int]]:
    """What makes the code, and how many coordinates fit at a ratio."""
    if isinstance(compression, TopK):
        return Pairs, partial(_pairs, layout)
    if isinstance(compression, Sharded | Auto):
        settings = {field.name: getattr(compression, field.name) for field in fields(Bucketed) if field.init}
        alone = Sharded(**{**settings, "half": False, "buckets": 1})
        return FourBits, lambda ratio: sum(codec.count for _, codec in alone.fit(layout, ratio, 1))
    if isinstance(compression, Stride):
        return partial(Comb, seed=compression.seed), lambda ratio: compression.fit(layout, ratio, 1)
    raise ConfigurationError(
        f"{type(compression).__name__} cannot choose from one vector alone; use Compression.topk, sharded or stride"
    )


def _pairs(layout: Layout, ratio: float) -> int:
    """How many pairs fit into a message with its header, its count and the dense part.

    Raises:
        ConfigurationError: when not one does.
    """
    others, dense = HEADER + 4, 4 * layout.dense
    count = int((4 * layout.total / ratio - others - dense) / _PAIR)
    if count < 1:
        raise unreachable(layout, ratio, dense, others + _PAIR)
    return min(count, layout.compressed)


def _take(vector: Tensor, where: Any) -> Tensor:
    """Values of a vector in float32, which keeps what that rounds off."""
    values = vector[where].to(torch.float32, copy=True)
    vector[where] -= values
    return values


def _part(payload: Tensor, start: int, stop: int) -> Tensor:
    if payload.numel() < stop:
        raise ValueError(f"{payload.numel()} bytes, at least {stop} are needed")
    return payload[start:stop]


def _add(rows: Tensor, values: Tensor, vector: Tensor) -> None:
    """Add values at ascending rows."""
    if rows[0] < 0 or rows[-1] >= vector.numel() or not (rows.diff() > 0).all():
        raise ValueError(f"indices that are not ascending or not below {vector.numel()}")
    vector.index_add_(0, rows, values.to(vector.dtype))
