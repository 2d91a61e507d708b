"""Sketches of 32 cells, of all parameters of a vector at once: enough to tell the norm of a sum."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import gpu
from hvd_sketch.sketch.count_sketch import CountSketch

CELLS = 32
SLICE = 1 << 15
"""Coordinates that are added up one after the other; slices are added after that, in their order."""


class NarrowSketches:
    """One row of 32 cells for each of several stretches of a vector, all drawn alike.

    Each is a `CountSketch` of one row, but for the order in which a cell's values are added: within slices of
    2^15 coordinates, then slice by slice. So many processors can work on one stretch, and the bits are the same on
    all devices.

    Args:
        stretches: of the vector, each as ``(start, stop)``.
        device: where the vector lives.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._stretches = list(stretches)
        self._slices = [max(1, -(-(stop - start) // SLICE)) for start, stop in stretches]
        self._first = [0, *accumulate(self._slices)]
        places = [
            (start + SLICE * number, stop, number)
            for (start, stop), slices in zip(stretches, self._slices, strict=True)
            for number in range(slices)
        ]
        self._places = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 3)
        self._edges = torch.tensor(self._first, dtype=torch.int64, device=device)

    def __call__(self, vector: Tensor, seed: int, scale: float = 1.0) -> Tensor:
        """The tables of ``scale * vector`` (float32), of shape ``(stretches, 32)``."""
        if gpu.serves(vector):
            tables: Tensor = self._kernels.tables(vector, seed, scale)
            return tables
        parts = vector.new_zeros(self._first[-1], 1, CELLS)
        for (start, stop), first, slices in zip(self._stretches, self._first, self._slices, strict=False):
            for number in range(slices if stop > start else 0):
                offset = SLICE * number
                sketch = CountSketch(stop - start, 1, CELLS, seed, table=parts[first + number])
                sketch.add(vector[start + offset : min(stop, start + offset + SLICE)], offset, scale)
        return torch.stack([_in_order(part) for part in parts.squeeze(1).split(self._slices)])

    def measure(self, vector: Tensor, seed: int, owned: slice) -> tuple[Tensor, Tensor]:
        """The tables, and the sum of the squares (float32) of each stretch.

        ``owned`` are coordinates at a distance of the number of ranks: there the vector counts, in its square and not
        in the table, as so many times smaller.
        """
        if gpu.serves(vector):
            tables, energies = self._kernels.measure(vector, seed, owned)
            return tables, energies
        energies = _energies([vector[start:stop] for start, stop in self._stretches])
        if owned.stop:
            edges = [edge for stretch in self._stretches for edge in stretch]
            rows = [-(-(min(edge, owned.stop) - owned.start) // owned.step) for edge in edges]
            held = [vector[owned][start:stop] for start, stop in zip(rows[::2], rows[1::2], strict=True)]
            energies -= (1.0 - owned.step**-2) * _energies(held)
        return self(vector, seed), energies

    @cached_property
    def _kernels(self) -> Any:
        kernels = importlib.import_module("hvd_sketch.sketch.narrow_cuda")  # with Triton
        return kernels.NarrowKernels(self._places, self._edges, SLICE, CELLS)


def _energies(vectors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(vectors)).square()


def _in_order(parts: Tensor) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
