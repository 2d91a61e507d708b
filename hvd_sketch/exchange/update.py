"""The update of a step as it was received, on its way to where it is wanted."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch import gpu, native
from hvd_sketch.exchange.domain import Domain
from hvd_sketch.layout import Layout
from hvd_sketch.sparse.places import Places


@dataclass(frozen=True, eq=False)
class Part:
    """Coordinates ``where`` of the update: zeros but for the values at some places, or without places all values.

    Where all ranks have computed it from something smaller that they received, that is its ``source``.
    """

    where: slice
    values: Tensor
    places: Places | None = None
    source: Tensor | None = None

    def contents(self) -> list[Tensor]:
        """What it is made of: equal on ranks that have the same part."""
        if self.source is not None:
            return [self.source]
        return [self.values] if self.places is None else [self.values, self.places.numbers]

    def write(self, vector: Tensor) -> None:
        """Write it to a vector of its size."""
        if self.places is None:
            vector.copy_(self.values)
        else:
            self.places.put(vector.zero_(), self.values)

    def write_in_pieces(self, pieces: Mapping[int, Tensor], factor: float) -> None:
        """Write it, times a factor, to stretches of it, by the coordinate of their first element, ascending."""
        if self.places is not None:
            self.places.put_in_pieces(pieces, self.values * factor, clear=True)
            return
        if not pieces:
            return
        its = [self.values[start : start + piece.numel()].view_as(piece) for start, piece in pieces.items()]
        torch._foreach_copy_(list(pieces.values()), its if factor == 1.0 else torch._foreach_mul(its, factor))


def _takes_pieces(tensor: Tensor) -> bool:
    """Whether a kernel can write to this tensor as one run of float32."""
    on_gpu = tensor.dtype == torch.float32 and tensor.is_contiguous() and gpu.serves(tensor)
    return on_gpu or native.serves_floats(tensor)


class Update:
    """The update of all coordinates, in parts; a vector of all of them only when somebody asks for it.

    Parts are given in the coordinates of an exchange's `Domain`; what is asked for is the model's.
    """

    def __init__(self, layout: Layout, device: torch.device, domain: Domain | None = None) -> None:
        self._layout, self._device, self._domain = layout, device, domain or Domain(layout, None)
        self._offsets = [slot.offset for slot in layout.slots]
        self._parts: tuple[Part, ...] = ()
        self._whole: Tensor | None = None

    def hold(self, *parts: Part) -> None:
        """Take these as the update; together they are all of it. Of none, it is what `whole` has.

        Where the domain is another than the model's they leave it now: its scales may change before somebody asks.
        """
        self._parts = parts
        if not self._domain.is_models:
            self.whole()

    def whole(self) -> Tensor:
        """The update in the layout's order, float32; also to be written to."""
        if self._whole is None:
            self._whole = torch.zeros(self._layout.total, dtype=torch.float32, device=self._device)
        for part in self._parts:
            part.write(self._whole[part.where])
        if self._parts:
            self._domain.leave(self._whole)
        self._parts = ()
        return self._whole

    def contents(self) -> list[Tensor]:
        """All that it is made of."""
        if not self._parts:
            return [self.whole()]
        return [content for part in self._parts for content in part.contents()]

    def of(self, position: int) -> Tensor:
        """The update of one slot in its shape: a view of `whole`."""
        slot = self._layout.slots[position]
        return self.whole()[slot.offset : slot.stop].view(slot.shape)

    def write(self, tensors: Mapping[int, Tensor], factor: float) -> None:
        """Write it, times a factor, to tensors of any dtype and strides, by the position of their slot.

        Those that the kernels serve get it from the parts.
        """
        direct = {at: tensor for at, tensor in tensors.items() if self._parts and _takes_pieces(tensor)}
        for part in self._parts if direct else ():
            part.write_in_pieces(self._pieces(part.where, direct), factor)
        rest = {at: tensor for at, tensor in tensors.items() if at not in direct}
        if rest:
            updates = [self.of(at) for at in rest]
            if factor != 1.0:
                updates = [update * factor for update in updates]
            torch._foreach_copy_(list(rest.values()), updates)

    def _pieces(self, where: slice, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What of the tensors lies in a stretch of the vector, by the place in it where it begins."""
        found = {}
        first = bisect_right(self._offsets, where.start) - 1
        for at in range(first, bisect_left(self._offsets, where.stop, first)):
            if at not in tensors:
                continue
            slot, tensor = self._layout.slots[at], tensors[at]
            start, stop = max(slot.offset, where.start), min(slot.stop, where.stop)
            if start < stop:
                found[start - where.start] = tensor.view(-1)[start - slot.offset : stop - slot.offset]
        return found
