"""One vector of all parameters cut into as many parts as ranks share it, and carried there and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hvd_sketch.comm.copies import COPIES
from hvd_sketch.layout import DensePredicate, Layout, Slot

SPARE = COPIES
"""Elements at the end of a row that belong to no part."""

_NEAR = 1 / 16
"""Of a part: so far a cut may be from an even one, to come to the edge of a parameter, or of a row of it."""


class Piece(NamedTuple):
    """A part of a parameter, or all of it: its shape, and where it begins in the whole vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int


def divide(layout: Layout, count: int, *, whole_tensors: bool) -> list[list[Piece]]:
    """Cut compressed and dense coordinates alike into so many parts of about equal size.

    A part has a share of every parameter, rows of a matrix if there are enough, so that all parts are alike: where
    each may send equally much, a part of the parameters with the largest gradients would get too little through.
    """
    return _between(layout, count) if whole_tensors else _across(layout, count)


def _across(layout: Layout, count: int) -> list[list[Piece]]:
    """Of every parameter a part to each, the larger ones in turn."""
    parts: list[list[Piece]] = [[] for _ in range(count)]
    for position, slot in enumerate(slot for slot in layout.slots if slot.numel):
        row = slot.numel // slot.shape[0] if len(slot.shape) > 1 and slot.shape[0] >= count else 1
        rows = slot.numel // row
        cuts = [slot.offset + row * (rows * number // count) for number in range(count + 1)]
        for number, (first, last) in enumerate(pairwise(cuts)):
            if first < last:
                parts[(number + position) % count].append(_piece(slot, first, last))
    return parts


def _between(layout: Layout, count: int) -> list[list[Piece]]:
    """At the edge of a parameter if one is near, else between two rows of a matrix if they are small enough."""
    parts: list[list[Piece]] = [[] for _ in range(count)]
    for start, stop in ((0, layout.compressed), (layout.compressed, layout.total)):
        slots = [slot for slot in layout.slots if start <= slot.offset < stop and slot.numel]
        edges = [start, *(_settled(slots, start, stop - start, at, count) for at in range(1, count)), stop]
        for part, (first, last) in zip(parts, pairwise(edges), strict=True):
            part.extend(_piece(slot, first, last) for slot in slots if slot.offset < last and first < slot.stop)
    return parts


def _settled(slots: Sequence[Slot], start: int, size: int, number: int, count: int) -> int:
    """Where the cut of this number comes to be."""
    even, near = start + size * number // count, _NEAR * size / count
    for slot in slots:
        if slot.offset <= even < slot.stop:
            row = slot.numel // slot.shape[0] if len(slot.shape) > 1 else 1
            between = slot.offset + row * round((even - slot.offset) / row)
            edge = min((slot.offset, slot.stop), key=lambda edge: abs(edge - even))
            return next((cut for cut in (edge, between) if abs(cut - even) <= near), even)
    return even


def _piece(slot: Slot, first: int, last: int) -> Piece:
    """What of a slot lies between two edges: as it is, whole rows, part of a row, or of a vector."""
    start, stop = max(first, slot.offset), min(last, slot.stop)
    numel = stop - start
    if numel == slot.numel or len(slot.shape) < 2:
        return Piece(slot.name, slot.shape if numel == slot.numel else (numel,), start, numel)
    row = slot.numel // slot.shape[0]
    whole = not ((start - slot.offset) % row or numel % row)
    return Piece(slot.name, (numel // row, *slot.shape[1:]) if whole else (1, numel), start, numel)


class LaysOut(Protocol):
    """What a `Division` needs of a compressor; see `hvd_sketch.compressors.base.Compressor`."""

    @property
    def wants_whole_tensors(self) -> bool: ...

    def layout(
        self, named_parameters: Iterable[tuple[str, Tensor]], is_dense: DensePredicate | None = None
    ) -> Layout: ...


class Division:
    """The parts of a layout, one for each of ``count`` ranks, every one with a layout of its own.

    Args:
        layout: of the whole vector.
        count: of the ranks.
        compressor: lays out the pieces of a part; a piece stands for a parameter of its name and shape.

    Attributes:
        layouts: of the parts.
        width: coordinates of the largest, and `SPARE` more.
    """

    def __init__(self, layout: Layout, count: int, compressor: LaysOut) -> None:
        self.layouts, self._places, self._sizes = list[Layout](), list[tuple[int, int]](), list[int]()
        divided = divide(layout, count, whole_tensors=compressor.wants_whole_tensors)
        compressed = {slot.name for slot in layout.slots if slot.offset < layout.compressed}
        is_dense = None if compressor.wants_whole_tensors else lambda name, _: name not in compressed
        for pieces in divided:
            self.layouts.append(compressor.layout([(piece.name, _stand_in(piece)) for piece in pieces], is_dense))
        self.width = SPARE + max(part.total for part in self.layouts)
        for pieces, part in zip(divided, self.layouts, strict=True):
            starts = {piece.name: piece.start for piece in pieces}
            self._places += [(starts[slot.name], slot.numel) for slot in part.slots]
            self._sizes += [slot.numel for slot in part.slots] + [self.width - part.total]
        self._padding = [len(part.slots) for part in self.layouts]

    def of_vector(self, vector: Tensor) -> list[Tensor]:
        """Views of the whole vector, piece by piece and part by part."""
        return [vector[start : start + numel] for start, numel in self._places]

    def of_rows(self, rows: Tensor) -> list[Tensor]:
        """Views of the same pieces where every part has a row of ``width`` elements, contiguous."""
        views = iter(rows.view(-1).split(self._sizes))
        found = []
        for count in self._padding:
            found += [next(views) for _ in range(count)]
            next(views)
        return found


def _stand_in(piece: Piece) -> Tensor:
    """A tensor of its shape that takes no memory."""
    return torch.zeros((), dtype=torch.float32, device="cpu").expand(piece.shape)
