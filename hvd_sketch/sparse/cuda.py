"""Choosing from a vector on the GPU: same function and same results as `hvd_sketch.sparse.heaviest`'s reference.

Importing this module needs Triton. Nothing here waits for the GPU, and the vector is read twice:

1. a sample of each shard tells between which magnitudes its k-th largest nearly certainly lies;
2. `sift`, the first reading, counts what lies above that bracket, and keeps what lies inside, a small part of k;
3. among those the k-th largest is found digit by digit, and counted what lies above it and what is equal to it;
4. `write`, the second reading, writes what is chosen where the counts before say, in ascending order.

Should the sample have misled, 3 looks at the whole shard: the result is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.sparse import cuda_kernels as kernels

_RUNS = 2048
_TOGETHER = 2048
"""Entries that a program takes at once."""
_SAMPLE = 1 << 14
_MARGIN = 6.0
"""Standard deviations; the sample misleads once in half a billion times."""
_DIGITS = (11, 10, 10)
_COPIES = 8
_PROGRAMS = 256


def heaviest(vector: Tensor, shards: int, count: int) -> tuple[Tensor, Tensor]:
    """As `hvd_sketch.sparse.heaviest.heaviest_of_shards`; not for more shards than a program can take at once."""
    rows = torch.empty(shards, count, dtype=torch.int64, device=vector.device)
    values = torch.empty(shards, count, dtype=torch.float32, device=vector.device)
    with torch.cuda.device_of(vector):
        _Choice(vector.contiguous(), shards, count).write(rows, values)
    return rows, values


class _Choice:
    """Which of a vector's entries are chosen."""

    def __init__(self, vector: Tensor, shards: int, count: int) -> None:
        size, device = vector.numel(), vector.device
        wide = 1 << (shards - 1).bit_length()
        together = max(1, _TOGETHER // wide)
        rows = -(-size // shards)
        self._run = -(-rows // (_RUNS * together)) * together
        self._runs = -(-rows // self._run)
        self._vector, self._count, self._shards = vector, count, shards
        self._shape = {"wide": shards, "shards": wide, "rows": together}
        self._room = min(rows, count + count // 2 + 4096)
        self._state = torch.empty(shards, kernels.FIELDS.value, dtype=torch.int64, device=device)
        self._before = torch.empty(2, shards, self._runs, dtype=torch.int64, device=device)
        self._kept = torch.empty(2, shards, self._room, dtype=torch.int32, device=device)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Choose, and write what was chosen."""
        self._look()
        self._find()
        counts = {"run": self._run, "count": self._count}
        size = self._vector.numel()
        kernels.write[self._runs,](
            self._vector, self._state, *self._before, rows, values, size=size, **counts, **self._shape
        )

    def _look(self) -> None:
        """Take the sample, and read the vector for the first time."""
        size, state, before = self._vector.numel(), self._state, self._before
        one = (self._shards,)
        kernels.bracket[one](
            self._vector, state, size, *self._ranks(), wide=self._shards, sample=_SAMPLE, num_warps=16
        )
        kernels.sift[self._runs,](
            self._vector, state, *before, *self._kept, size=size, run=self._run, room=self._room, **self._shape
        )
        kernels.settle[one](
            state, *before, size, self._count, self._room, self._runs, wide=self._shards, most_runs=_RUNS
        )

    def _ranks(self) -> tuple[int, int]:
        """Two ranks in the sample, between which that of the k-th largest nearly certainly lies."""
        rows = -(-self._vector.numel() // self._shards)
        if rows <= _SAMPLE:
            return self._count, self._count
        expected = self._count * _SAMPLE / rows
        spread = _MARGIN * (math.sqrt(expected) + 1.0)
        return min(_SAMPLE, max(1, math.ceil(expected + spread))), math.floor(expected - spread)

    def _find(self) -> None:
        """Find the k-th largest of each shard, and count up to each run."""
        vector, state, (kept, kept_run) = self._vector, self._state, self._kept
        grid, one = (max(1, _PROGRAMS // self._shards), self._shards), (self._shards,)
        lanes: dict[str, Any] = {"wide": self._shards, "lanes": 1024}
        counts = torch.zeros(
            len(_DIGITS), self._shards * _COPIES << max(_DIGITS), dtype=torch.int32, device=vector.device
        )
        for digit_bits, each in zip(_DIGITS, counts, strict=True):
            digit = {"digit_bits": digit_bits, "copies": _COPIES}
            kernels.count_digits[grid](vector, kept, state, each, self._room, **digit, **lanes)
            kernels.find_digit[one](state, each, **digit)
        kernels.tally[grid](vector, kept, kept_run, state, *self._before, self._room, self._run, self._runs, **lanes)
        kernels.add_up[one](state, *self._before, self._runs, most_runs=_RUNS)
