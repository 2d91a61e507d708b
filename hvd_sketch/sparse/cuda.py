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
_TOGETHER = 256
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
    with torch.cuda.device_of(vector):
        return _candidates(vector.contiguous(), shards, count).choose(count)


class Candidates:
    """What is looked at for the largest entries of each shard, ascending; see `hvd_sketch.sparse.cuda_kernels`.

    Args:
        vector: of which a shard is looked at if there are no candidates of it.
        state: int64, a line for each shard; ``FOUND`` and what it stands on is settled.
        room: for so many candidates of each shard there is space.
    """

    def __init__(self, vector: Tensor, state: Tensor, room: int) -> None:
        self.state, self.room = state, room
        self._shards, self._device = len(state), state.device
        kept = torch.empty(2, self._shards, room, dtype=torch.int32, device=self._device)
        self.rows, self.values = kept[0], kept[1].view(torch.float32)
        self._looked_at = (vector, self.rows, self.values)
        self._parts = max(1, _PARTS // self._shards)
        self._lanes: dict[str, Any] = {"wide": self._shards, "lanes": _LANES, "num_warps": 1}

    def choose(self, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest of each shard: rows (int64) and values, each ``(shards, count)``."""
        rows = torch.empty(self._shards, count, dtype=torch.int64, device=self._device)
        values = torch.empty(self._shards, count, dtype=torch.float32, device=self._device)
        self.write(rows, values)
        return rows, values

    def write(self, rows: Tensor, values: Tensor) -> None:
        """The same, to where they are wanted; nothing of a shard of which nothing is looked at."""
        self._find()
        grid, count = (self._parts, self._shards), rows.shape[1]
        before = torch.empty(2, self._shards, self._parts, dtype=torch.int64, device=self._device)
        kernels.weigh[grid](*self._looked_at, self.state, *before, self.room, **self._lanes)
        kernels.add_up[self._shards,](*before, self._parts, most_parts=_PARTS)
        kernels.write[grid](*self._looked_at, self.state, *before, rows, values, self.room, count, **self._lanes)

    def _find(self) -> None:
        """Find the k-th largest of each shard."""
        counts = torch.zeros(
            len(_DIGITS), self._shards * _COPIES << max(_DIGITS), dtype=torch.int32, device=self._device
        )
        grid = (self._parts, self._shards)
        for digit_bits, each in zip(_DIGITS, counts, strict=True):
            digit = {"digit_bits": digit_bits, "copies": _COPIES}
            kernels.count_digits[grid](*self._looked_at, self.state, each, self.room, **digit, **self._lanes)
            kernels.find_digit[self._shards,](self.state, each, **digit)


def settle(state: Tensor, counts: Tensor, size: int, count: int, room: int) -> None:
    """See the kernel of that name; ``counts`` are ``(3, shards, runs)``: above, equal, chosen."""
    shards, runs = counts.shape[1:]
    numbers: dict[str, Any] = {"wide": shards, "most_runs": _RUNS, "num_warps": 8}
    kernels.settle[shards,](state, *counts, size, count, room, runs, **numbers)


def _candidates(vector: Tensor, shards: int, count: int) -> Candidates:
    """Take the sample, and read the vector twice to write down the candidates."""
    size, device = vector.numel(), vector.device
    rows, wide = -(-size // shards), 1 << (shards - 1).bit_length()
    ranks = _ranks(rows, count)
    room = min(rows, max(count, _within(rows, ranks[0])))
    state = torch.empty(shards, kernels.FIELDS.value, dtype=torch.int64, device=device)
    together = max(1, _TOGETHER // wide)
    run = -(-rows // (_RUNS * together)) * together
    runs = -(-rows // run)
    counts = torch.empty(3, shards, runs, dtype=torch.int64, device=device)
    whole: dict[str, Any] = {"size": size, "run": run, "wide": shards, "shards": wide, "rows": together}
    kernels.bracket[shards,](vector, state, size, *ranks, wide=shards, sample=_SAMPLE, num_warps=16)
    kernels.count[runs,](vector, state, *counts, **whole, num_warps=1)
    settle(state, counts, size, count, room)
    candidates = Candidates(vector, state, room)
    to = (candidates.rows, candidates.values)
    kernels.collect[runs,](vector, state, counts[0], *to, **whole, room=room, num_warps=1)
    return candidates


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
