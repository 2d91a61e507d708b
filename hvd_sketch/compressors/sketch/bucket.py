"""The arithmetic of a sketched step on one part of the vector, between its messages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvd_sketch import grid, wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressors.sketch.plan import SketchPlan
from hvd_sketch.exchange.intake import Factor
from hvd_sketch.exchange.update import Part
from hvd_sketch.gpu import Recorded
from hvd_sketch.grid import Grid
from hvd_sketch.memory import Memory
from hvd_sketch.saved import Form, Maybe
from hvd_sketch.sketch import CountSketch
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.comb import comb, most_of


class Scales:
    """The powers of two by which a bucket travels in half precision; they outlive a plan.

    Attributes:
        cell: of the table; None until a sum other than zero was seen.
        comb, dense: of the values that are sent in turn, and of those that are sent in every step.
    """

    def __init__(self, dense: int, dtype: torch.dtype) -> None:
        self.cell: float | None = None
        self.comb, self.dense = Grid(0, dtype), Grid(dense, dtype)

    def forget(self) -> None:
        """Begin again in float32."""
        self.cell = self.comb.scales = self.dense.scales = None

    def state(self) -> tuple[float | None, Tensor | None, Tensor | None]:
        """To be saved: cell, comb, dense."""
        return self.cell, self.comb.scales, self.dense.scales

    def form(self) -> Form:
        """What can be restored."""
        return Maybe(float), self.comb.form(fixed=False), self.dense.form(fixed=True)

    def restore(self, state: tuple[float | None, Tensor | None, Tensor | None], device: torch.device) -> None:
        """Take up what `state` gave."""
        self.cell, comb, dense = state
        self.comb.restore(comb, device)
        self.dense.restore(dense, device)


class SketchBucket:
    """Views of a part of gradient and memory, ``compressed`` coordinates and then dense ones, and the update of it.

    In every step, in this order: `pack`, whose message is summed over the ranks, `open`, `choose`, whose
    message is summed as well, `read`, `update`; and `advance` before or after `read`. Sends nothing
    by itself; `open` and `read` are where the host waits for the device. In half precision cells carry a
    power-of-two scale that follows from the last sum, so all ranks know it (the first is in float32); values
    travel on a `grid`, so that their sum rounds nothing, and what is rounded off before stays in the memory.
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
        self._first = torch.zeros(wire.HEADER + plan.rows * plan.cols, dtype=dtype, device=device)
        scales.comb.resize(most_of(compressed, plan.stride))
        self._told = Recorded(self._tell, device)
        self.energy = self.norm = 0.0
        """Of what the last step sent, squared, and of the memory's sum by the sketch's estimate."""

    def carry(self, seed: int) -> None:
        """Draw the buckets and signs of a step, and sketch what the memory carries into it."""
        self._sketch.reset(seed)
        self._memory.sketch_carried(self._sketch)

    def pack(self, clip: Factor, ranks: int) -> Tensor:
        """Round 1: complete the table of what is computed; its message."""
        self._clip = clip
        scale = clip if self._memory.gain == 1.0 else self._memory.gain * clip
        self._sketch.add(self._gradient[: self._compressed], scale=scale)
        self._message = self._first.to(self._dtype if self._scales.cell else torch.float32)
        wire.pack(self._message[wire.HEADER :], self._sketch.table.view(-1), self._scales.cell or 1.0, ranks)
        return self._message

    def open(self, ranks: int) -> wire.Header:
        """Read round 1's sum: the table and the header."""
        wire.unpack(self._message[wire.HEADER :], self._scales.cell or 1.0, self._sketch.table.view(-1))
        (told,) = self._told(self._message[: wire.HEADER].float())
        *lanes, largest, self.norm = told.tolist()
        header = wire.Header.of(lanes)
        self._all_present = header.present == ranks
        self._next_cell = self._scales.cell
        if header.finite and self._all_present:
            self._next_cell = wire.shared_scale(largest / ranks, ranks, self._dtype) if largest > 0.0 else None
        return header

    def choose(self, comm: Communicator, step: int, seed: int) -> Tensor:
        """Take the heaviest coordinates of the summed table and the step's comb.

        Returns:
            the message of their exact values, and of the dense ones.
        """
        candidates, estimates = self._sketch.top_k(self._plan.candidates)
        self._chosen = Chosen(candidates, comb(self._compressed, self._plan.stride, step, seed))
        self._computed = self._memory.computed(self._gradient, self._clip, self._chosen)
        self._dense_computed = self._memory.computed(self._gradient, self._clip, self._dense)
        self._each = grid.scales_of(estimates.abs_().div_(comm.size), comm.size)
        self._second = message = self._new_message(comm.size)
        wire.write_header(message)
        wire.write_digest(message[wire.DIGEST], self._drawn(), _number(self._next_cell))
        fetched, in_turn, dense = self._lanes(comm.size)
        few = candidates.numel()
        sent = (
            grid.put(fetched, self._computed[:few], self._each, comm),
            self._scales.comb.put(in_turn, self._computed[few:], comm),
        )
        self._left = self._computed - torch.cat(sent)
        self._dense_left = self._dense_computed - self._scales.dense.put(dense, self._dense_computed, comm)
        return message

    def advance(self, seed: int) -> None:
        """Take the gradient into the memory, keep what is not sent, and `carry` it into a step of this seed."""
        self._sketch.reset(seed)
        self._memory.advance(self._gradient, self._clip, self._sketch, self._chosen, self._left)
        self._memory.keep(self._dense, self._dense_left, mask=False)

    def read(self, comm: Communicator) -> bool:
        """Read round 2's sum: False if ranks chose differently. Of more candidates than k, drop the others.

        The step is taken, so the scales of the next one follow from its sums.
        """
        self._scales.cell = self._next_cell
        fetched, in_turn, dense = self._lanes(comm.size)
        few, count, learn = self._each.numel(), self._computed.numel(), self._all_present
        in_comb = self._scales.comb.take(in_turn, count - few, comm, learn=learn)
        self._sums = torch.cat([grid.take(fetched, self._each), in_comb])
        self._dense_update = self._scales.dense.take(dense, self._dense_computed.numel(), comm, learn=learn)
        if self._plan.k < self._plan.candidates:
            self._drop_lightest()
        norm = torch.linalg.vector_norm(self._sums).reshape(1)
        *lanes, sent = torch.cat([self._second[: wire.HEADER].float(), norm]).tolist()
        self.energy = sent**2
        return wire.Header.of(lanes).agreed

    def put_back(self, *, advanced: bool) -> None:
        """Instead of `update`, when ranks have seen different sums: the memory gets the whole step, unsent."""
        self._scales.forget()
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

    def _tell(self, header: Tensor) -> tuple[Tensor]:
        """The header's lanes, the largest cell, and the norm of what is sketched."""
        sizes = torch.stack([_largest(self._sketch.table.view(-1)), self._sketch.l2_norm().float()])
        return (torch.cat([header, sizes]),)

    def _drop_lightest(self) -> None:
        """Of more candidates than k, keep those of the largest sums."""
        order = torch.sort(self._sums[: self._plan.candidates].abs(), descending=True, stable=True).indices
        kept = order[: self._plan.k].sort().values
        of_comb = torch.arange(self._plan.candidates, self._sums.numel(), device=kept.device)
        lanes = torch.cat([kept, of_comb])
        self._chosen = Chosen(self._chosen.indices[kept], self._chosen.comb)
        self._sums, self._left = self._sums[lanes], self._left[lanes]

    def _new_message(self, ranks: int) -> Tensor:
        """Of round 2, in half precision where all of its scales are known."""
        grids = (self._scales.comb, self._scales.dense)
        halves = all(each.dtype(ranks) == torch.float16 for each in grids)
        lanes = wire.HEADER + self._plan.candidates + sum(each.lanes(ranks) for each in grids)
        dtype = torch.float16 if halves else torch.float32
        return torch.empty(lanes, dtype=dtype, device=self._gradient.device)

    def _lanes(self, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of round 2's message: what was fetched, the comb's, the dense ones."""
        sizes = (self._plan.candidates, self._scales.comb.lanes(ranks), self._scales.dense.lanes(ranks))
        fetched, in_turn, dense = self._second[wire.HEADER :].split(sizes)
        return fetched, in_turn, dense

    def _drawn(self) -> Tensor:
        """What must be the same on all ranks in round 2: coordinates, and the bits of all scales of values."""
        given = [scales.scales for scales in (self._scales.comb, self._scales.dense) if scales.scales is not None]
        bits = torch.cat([self._each, *given]).view(torch.int32).long()
        bits[: self._each.numel()].bitwise_xor_(self._chosen.indices << 32)
        return bits


def _number(scale: float | None) -> int:
    """One that tells powers of two apart."""
    return 0 if scale is None else math.frexp(scale)[1] + 256


def _largest(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros(())
    least, most = torch.aminmax(values)
    return torch.maximum(-least, most)
