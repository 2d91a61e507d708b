"""The arithmetic of a sketched step on one part of the vector, between its messages."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.compressors.sketch.plan import SketchPlan
from hvd_sketch.exchange.update import Part
from hvd_sketch.memory import Memory
from hvd_sketch.sketch import CountSketch
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.comb import comb

_DIGEST = slice(wire.HEADER, wire.HEADER + wire.DIGEST_BITS)
_VALUES = wire.HEADER + wire.DIGEST_BITS


@dataclass
class Scales:
    """Powers of two of a message's cells and dense values; None until a sum other than zero was seen."""

    cell: float | None = None
    dense: float | None = None


class SketchBucket:
    """Views of a part of gradient and memory, ``compressed`` coordinates and then dense ones, and the update of it.

    In every step, in this order: `pack`, whose message is summed over the ranks, `open`, `choose`, whose
    message is summed as well, `read`, `update`; and `advance` before or after `read`. Sends nothing
    by itself; `open` and `read` are where the host waits for the device. In half precision cells and
    values carry a power-of-two scale that follows from the last sum, so all ranks know it (the first
    is in float32); what rounding cut off stays in the memory.
    """

    def __init__(
        self,
        gradient: Tensor,
        memory: Memory,
        compressed: int,
        plan: SketchPlan,
        scales: Scales,
        dtype: torch.dtype,
    ) -> None:
        device = gradient.device
        self._gradient, self._memory, self._dtype = gradient, memory, dtype
        self._compressed, self._plan, self._scales = compressed, plan, scales
        self._dense = slice(compressed, gradient.numel())
        self._sketch = CountSketch(compressed, plan.rows, plan.cols, device=device)
        dense = gradient.numel() - compressed
        self._first = torch.zeros(wire.HEADER + plan.rows * plan.cols + dense, dtype=dtype, device=device)
        in_comb = -(-compressed // plan.stride) if plan.stride else 0
        self._second = torch.zeros(_VALUES + plan.candidates + in_comb, dtype=dtype, device=device)
        self._dense_update = torch.zeros(dense, dtype=torch.float32, device=device)
        self.energy = self.norm = 0.0
        """Of what the last step sent, squared, and of the memory's sum by the sketch's estimate."""

    def carry(self, seed: int) -> None:
        """Draw the buckets and signs of a step, and sketch what the memory carries into it."""
        self._sketch.reset(seed)
        self._memory.sketch_carried(self._sketch)

    def pack(self, clip: float, ranks: int) -> Tensor:
        """Round 1: complete the table of what is computed; the message of table and dense values."""
        self._clip = clip
        self._sketch.add(self._gradient[: self._compressed], scale=self._memory.gain * clip)
        self._dense_computed = self._memory.computed(self._gradient, clip, self._dense)
        self._message = self._first.to(self._dtype if self._scales.cell else torch.float32)
        table, dense = self._lanes()
        wire.pack(table, self._sketch.table.view(-1), self._scales.cell or 1.0, ranks)
        wire.pack(dense, self._dense_computed.clone(), self._scales.dense or 1.0, ranks)
        sent = wire.unpack(dense, self._scales.dense or 1.0, torch.empty_like(self._dense_computed))
        self._dense_left = self._dense_computed - sent
        return self._message

    def open(self, ranks: int) -> wire.Header:
        """Read round 1's sum: the table, the dense update, and the header."""
        table, dense = self._lanes()
        cells = wire.unpack(table, self._scales.cell or 1.0, self._sketch.table.view(-1))
        update = wire.unpack(dense, self._scales.dense or 1.0, self._dense_update)
        sizes = torch.stack([_largest(cells), _largest(update), self._sketch.l2_norm().float()])
        told = torch.cat([self._message[: wire.HEADER], sizes])
        *lanes, self._largest_cell, largest_dense, self.norm = told.tolist()
        header = wire.Header.of(lanes)
        if header.finite and header.present == ranks:
            self._rescale(self._largest_cell / ranks, largest_dense / ranks, ranks)
        return header

    def choose(self, ranks: int, step: int, seed: int) -> Tensor:
        """Take the heaviest coordinates of the summed table and the step's comb; the message of their exact values."""
        candidates, _ = self._sketch.top_k(self._plan.candidates)
        self._chosen = Chosen(candidates, comb(self._compressed, self._plan.stride, step, seed))
        self._computed = self._memory.computed(self._gradient, self._clip, self._chosen)
        self._scale = wire.shared_scale(self._largest_cell / ranks, ranks, self._dtype)
        message, lanes = self._second, self._values()
        message[_VALUES + self._computed.numel() :] = 0.0  # a comb may have one coordinate less
        wire.write_header(message, True)
        wire.write_digest(message[_DIGEST], candidates, _fingerprint(*astuple(self._scales), self._scale))
        wire.pack(lanes, self._computed.clone(), self._scale, ranks)
        self._left = self._computed - wire.unpack(lanes, self._scale, torch.empty_like(self._computed))
        return message

    def advance(self, seed: int) -> None:
        """Take the gradient into the memory, keep what is not sent, and `carry` it into a step of this seed."""
        self._sketch.reset(seed)
        self._memory.advance(self._gradient, self._clip, self._sketch, self._chosen, self._left)
        self._memory.keep(self._dense, self._dense_left, mask=False)

    def read(self) -> bool:
        """Read round 2's sum: False if ranks chose differently. Of more candidates than k, drop the others."""
        self._sums = wire.unpack(self._values(), self._scale, torch.empty_like(self._computed))
        if self._plan.k < self._plan.candidates:
            self._drop_lightest()
        agreed = wire.digests_agree(self._second[_DIGEST], self._second[1])
        agreed_by_all, sent = torch.stack([agreed.float(), torch.linalg.vector_norm(self._sums)]).tolist()
        self.energy = sent**2
        return bool(agreed_by_all)

    def put_back(self, *, advanced: bool) -> None:
        """Instead of `update`, when ranks have seen different sums: the memory gets the whole step, unsent."""
        self._scales.cell = self._scales.dense = None
        if not advanced:
            self._memory.absorb(self._gradient, self._clip)
            return
        self._memory.keep(self._dense, self._dense_computed, mask=False)
        self._memory.keep(self._chosen, self._computed, mask=False)

    def update(self, where: slice, divisor: float) -> tuple[Part, Part]:
        """The update of coordinates ``where``, of which this is the bucket: what was read, over a divisor."""
        edge = where.start + self._compressed
        return (
            Part(slice(where.start, edge), self._sums.mul_(1.0 / divisor), self._chosen),
            Part(slice(edge, where.stop), self._dense_update.mul_(1.0 / divisor)),
        )

    def _drop_lightest(self) -> None:
        """Of more candidates than k, keep those of the largest sums."""
        order = torch.sort(self._sums[: self._plan.candidates].abs(), descending=True, stable=True).indices
        kept = order[: self._plan.k].sort().values
        of_comb = torch.arange(self._plan.candidates, self._sums.numel(), device=kept.device)
        lanes = torch.cat([kept, of_comb])
        self._chosen = Chosen(self._chosen.indices[kept], self._chosen.comb)
        self._sums, self._left = self._sums[lanes], self._left[lanes]

    def _values(self) -> Tensor:
        return self._second[_VALUES : _VALUES + self._computed.numel()]

    def _lanes(self) -> tuple[Tensor, Tensor]:
        cells = self._sketch.table.numel()
        return self._message[wire.HEADER : wire.HEADER + cells], self._message[wire.HEADER + cells :]

    def _rescale(self, cell: float, dense: float, ranks: int) -> None:
        """Scales of the next step's message, from means that all ranks know; none from zeros."""
        known = cell > 0.0 and (dense > 0.0 or self._dense.stop == self._dense.start)
        self._scales.cell = wire.shared_scale(cell, ranks, self._dtype) if known else None
        self._scales.dense = wire.shared_scale(dense, ranks, self._dtype) if known else None


def _fingerprint(*scales: float | None) -> int:
    """A number that tells powers of two apart, nine bits for each."""
    number = 0
    for scale in scales:
        number = number << 9 | (0 if scale is None else math.frexp(scale)[1] + 256)
    return number


def _largest(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros(())
    least, most = torch.aminmax(values)
    return torch.maximum(-least, most)
