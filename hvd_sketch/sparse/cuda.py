"""Choosing from a vector on the GPU: same function and same results as `hvd_sketch.sparse.heaviest`'s reference.

Importing this module needs Triton. Nothing here waits for the GPU. The vector is read four times and an eighth:

1. count the upper 16 bits of each shard's magnitudes, and find in which of these bins its k-th largest lies;
2. count the lower 15 bits of those in the bin: now the k-th largest is known;
3. count, in each run of rows, those above it and those equal to it;
4. write them where the counts before say, in ascending order.

Before 1, the same is counted in every eighth run: the k-th largest of some is no larger than that of all, so 1 need
not count what lies below, which saves most of its atomic additions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_sketch.gpu import find_digit
from hvd_sketch.sparse import cuda_kernels as kernels

_PROGRAMS = 2048
_TOGETHER = 2048
"""Entries that a program takes at once."""
_SAMPLE = 8
_LOW_BITS = 15


def heaviest(vector: Tensor, shards: int, count: int) -> tuple[Tensor, Tensor]:
    """As `hvd_sketch.sparse.heaviest.heaviest_of_shards`; not for more shards than a program can take at once."""
    rows = torch.empty(shards, count, dtype=torch.int64, device=vector.device)
    values = torch.empty(shards, count, dtype=torch.float32, device=vector.device)
    with torch.cuda.device_of(vector):
        passes = _Passes(vector.contiguous(), shards)
        wanted = torch.full((shards, 1), count, dtype=torch.int64, device=vector.device)
        floor, _ = find_digit(passes.digits(torch.zeros_like(wanted), stride=_SAMPLE), wanted)
        upper, within = find_digit(passes.digits(floor), wanted)
        lower, ties = find_digit(passes.digits(upper, lower=True), within)
        limit = ((upper << _LOW_BITS) + lower).to(torch.int32)
        above, equal = passes.before(limit)
        passes.launch(kernels.write, limit, ties, above, equal, rows, values, run=passes.run, count=count)
    return rows, values


class _Passes:
    """What the passes over a vector have in common."""

    def __init__(self, vector: Tensor, shards: int) -> None:
        self._vector, self._shards = vector, shards
        self._wide = 1 << (shards - 1).bit_length()
        self._rows = max(1, _TOGETHER // self._wide)
        rows = -(-vector.numel() // shards)
        self.run = -(-rows // (_PROGRAMS * self._rows)) * self._rows
        self._programs = -(-rows // self.run)

    def launch(self, kernel: Any, *tensors: Tensor, **numbers: int) -> None:
        """Run a kernel on the vector, with tensors and numbers of its own."""
        kernel[self._programs,](
            self._vector,
            *tensors,
            size=self._vector.numel(),
            wide=self._shards,
            shards=self._wide,
            rows=self._rows,
            **numbers,
        )

    def digits(self, limit: Tensor, *, lower: bool = False, stride: int = 1) -> Tensor:
        """How many magnitudes of each shard have each value of a digit, as far as the limit lets them count."""
        bins = 1 << (_LOW_BITS if lower else 31 - _LOW_BITS)
        counts = torch.zeros(self._shards, bins, dtype=torch.int32, device=limit.device)
        self.launch(kernels.count_digits, counts, limit, stride=stride, lower=lower, low_bits=_LOW_BITS, bins=bins)
        return counts

    def before(self, limit: Tensor) -> tuple[Tensor, Tensor]:
        """How many magnitudes before each run of rows lie above the limit, and how many are equal to it."""
        counts = torch.empty(2, self._shards, self._programs, dtype=torch.int64, device=limit.device)
        self.launch(kernels.weigh, limit, counts[0], counts[1], run=self.run)
        above, equal = counts.cumsum(2) - counts
        return above, equal
