"""Choosing from a vector on the GPU: same function and same results as `hvd_sketch.sparse.heaviest`'s reference.

Importing this module needs Triton. Nothing here waits for the GPU, and the vector is read twice:

1. a sample of each shard tells between which magnitudes its k-th largest nearly certainly lies;
2. `count`, the first reading, counts in each run of rows what lies above the lower end of that bracket, somewhat more
   than k entries: the candidates;
3. `collect`, the second reading, writes them down in ascending order;
4. among them the k-th largest is found digit by digit, and what is chosen is written.

Should the sample have misled, or the k-th largest be one of too many equal entries, 4 looks at the whole shard: the
result is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.sparse import cuda_kernels as kernels

_RUNS = 8192
_TOGETHER = 512
"""Entries that a warp takes at once."""
_SAMPLE = 1 << 14
_MARGIN = 6.0
"""Standard deviations; the sample misleads once in half a billion times."""
_DIGITS = (11, 10, 10)
_COPIES = 8
_PARTS = 2048
_LANES = 512


def heaviest(vector: Tensor, shards: int, count: int) -> tuple[Tensor, Tensor]:
    """As `hvd_sketch.sparse.heaviest.heaviest_of_shards`.

    Not for more shards than a warp can take at once, nor for 2^31 rows.
    """
    rows = torch.empty(shards, count, dtype=torch.int64, device=vector.device)
    values = torch.empty(shards, count, dtype=torch.float32, device=vector.device)
    with torch.cuda.device_of(vector):
        choice = _Choice(vector.contiguous(), shards, count)
        choice.collect()
        choice.find()
        choice.write(rows, values)
    return rows, values


class _Choice:
    """Which of a vector's entries are chosen."""

    def __init__(self, vector: Tensor, shards: int, count: int) -> None:
        size, device = vector.numel(), vector.device
        wide = 1 << (shards - 1).bit_length()
        self._vector, self._count, self._shards, self._size = vector, count, shards, size
        self._rows = -(-size // shards)
        self._shape = {"wide": shards, "shards": wide, "rows": max(1, _TOGETHER // wide)}
        self._ranks = _ranks(self._rows, count)
        self._room = min(self._rows, max(count, _within(self._rows, self._ranks[0])))
        self._state = torch.empty(shards, kernels.FIELDS.value, dtype=torch.int64, device=device)
        kept = torch.empty(2, shards, self._room, dtype=torch.int32, device=device)
        self._looked_at = (vector, kept[0], kept[1].view(torch.float32))
        parts = max(1, _PARTS // shards)
        self._grid = (parts, shards)
        self._before = torch.empty(2, shards, parts, dtype=torch.int64, device=device)
        self._lanes: dict[str, Any] = {"wide": shards, "lanes": _LANES, "num_warps": 1}

    def collect(self) -> None:
        """Take the sample, and read the vector twice to write down the candidates."""
        together = self._shape["rows"]
        run = -(-self._rows // (_RUNS * together)) * together
        runs, one = -(-self._rows // run), (self._shards,)
        counts = torch.empty(3, self._shards, runs, dtype=torch.int64, device=self._vector.device)
        whole: dict[str, Any] = {"size": self._size, "run": run, **self._shape}
        sample: dict[str, Any] = {"wide": self._shards, "sample": _SAMPLE, "num_warps": 16}
        kernels.bracket[one](self._vector, self._state, self._size, *self._ranks, **sample)
        kernels.count[runs,](self._vector, self._state, *counts, **whole, num_warps=1)
        kernels.settle[one](
            self._state,
            *counts,
            self._size,
            self._count,
            self._room,
            runs,
            wide=self._shards,
            most_runs=_RUNS,
            num_warps=8,
        )
        vector, *kept = self._looked_at
        kernels.collect[runs,](vector, self._state, counts[0], *kept, **whole, room=self._room, num_warps=1)

    def find(self) -> None:
        """Find the k-th largest of each shard."""
        counts = torch.zeros(
            len(_DIGITS), self._shards * _COPIES << max(_DIGITS), dtype=torch.int32, device=self._vector.device
        )
        for digit_bits, each in zip(_DIGITS, counts, strict=True):
            digit = {"digit_bits": digit_bits, "copies": _COPIES}
            kernels.count_digits[self._grid](*self._looked_at, self._state, each, self._room, **digit, **self._lanes)
            kernels.find_digit[self._shards,](self._state, each, **digit)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Write what is chosen."""
        kernels.weigh[self._grid](*self._looked_at, self._state, *self._before, self._room, **self._lanes)
        kernels.add_up[self._shards,](*self._before, self._grid[0], most_parts=_PARTS)
        kernels.write[self._grid](
            *self._looked_at, self._state, *self._before, rows, values, self._room, self._count, **self._lanes
        )


def _ranks(rows: int, count: int) -> tuple[int, int]:
    """Two ranks in the sample of so many rows, between which that of the k-th largest nearly certainly lies."""
    if rows <= _SAMPLE:
        return count, count
    expected = count * _SAMPLE / rows
    spread = _MARGIN * (math.sqrt(expected) + 1.0)
    return min(_SAMPLE, max(1, math.ceil(expected + spread))), math.floor(expected - spread)


def _within(rows: int, rank: int) -> int:
    """How many rows nearly certainly suffice for what lies above that rank's entry in the sample."""
    return math.ceil((rank + abs(_MARGIN) * (math.sqrt(rank) + 1.0)) * rows / _SAMPLE)
