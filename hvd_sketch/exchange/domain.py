"""Where an exchange chooses: the coordinates of the model, or others that gradients enter and updates leave."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.layout import Layout
from hvd_sketch.mixing import Mixing


class Domain:
    """The coordinates of memory, messages and choice: ``y_q = T(g_q) / f_q`` of tensor q.

    T is a `Mixing`, or nothing; f a number a tensor, 1 unless somebody sets it. An exchange is linear, so it may work
    on y as it does on g, and what it sends and keeps adds up all the same.

    Attributes:
        scales: f in the layout's order, on the host; None where they are 1 for good.
    """

    def __init__(self, layout: Layout, mixing: str | None) -> None:
        self._slots = layout.slots
        self._mixing = None if mixing is None else Mixing(layout, mixing)
        self.scales: list[float] | None = None

    @property
    def is_models(self) -> bool:
        """Whether these are the model's own coordinates."""
        return self._mixing is None and self.scales is None

    def enter(self, part: Tensor, position: int) -> None:
        """Replace the entries of one slot (1-D, contiguous) by its coordinates here."""
        if self._mixing is not None:
            self._mixing.mix(part, position)
        if self.scales is not None:
            part.div_(self.scales[position])

    def enter_all(self, vector: Tensor) -> None:
        """Replace the entries of all slots."""
        if self._mixing is not None:
            self._mixing.mix_all(vector)
        if self.scales is not None:
            torch._foreach_div_(self._parts(vector), self.scales)

    def leave(self, vector: Tensor) -> Tensor:
        """Replace coordinates of the whole vector by the model's; returns it."""
        if self.scales is not None:
            torch._foreach_mul_(self._parts(vector), self.scales)
        if self._mixing is not None:
            self._mixing.unmix_all(vector)
        return vector

    def rescale(self, scales: list[float], *kept: Tensor) -> None:
        """From now on f is this; vectors of coordinates follow."""
        assert self.scales is not None
        factors = [old / new for old, new in zip(self.scales, scales, strict=True)]
        for vector in kept:
            torch._foreach_mul_(self._parts(vector), factors)
        self.scales = scales

    def _parts(self, vector: Tensor) -> list[Tensor]:
        return [vector[slot.offset : slot.stop] for slot in self._slots]
