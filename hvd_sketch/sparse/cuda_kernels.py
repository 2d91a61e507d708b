"""What runs on the GPU: the Triton kernels that `hvd_sketch.sparse.cuda` launches.

A vector of W shards is seen as rows of W entries, entry i as shard ``i mod W`` of row ``i div W``. A program takes
``rows`` rows of ``shards`` entries at once, of which those beyond W are masked: a power of two of either.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _entries(vector, size, start, wide: tl.constexpr, shards: tl.constexpr, rows: tl.constexpr):
    """The entries of some rows, and the bits of their magnitudes: -1 where there is no entry."""
    shard = tl.arange(0, shards)[None, :]
    at = tl.arange(0, rows)[:, None] * wide + shard
    left = tl.minimum(size - start * wide, rows * wide).to(tl.int32)
    inside = (shard < wide) & (at < left)
    values = tl.load(vector + start * wide + at, mask=inside, other=0.0)
    return tl.where(inside, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1), values


@triton.jit
def _kinds(bits, least):
    """1 for what lies above the limit, 65536 for what is equal to it: one sum of fewer rows counts both."""
    return (bits > least).to(tl.int32) + ((bits == least).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["size", "stride"])
def count_digits(
    vector: tl.tensor,
    counts: tl.tensor,
    limit: tl.tensor,
    size: tl.int64,
    stride: tl.int64,
    wide: tl.constexpr,
    shards: tl.constexpr,
    rows: tl.constexpr,
    lower: tl.constexpr,
    low_bits: tl.constexpr,
    bins: tl.constexpr,
):
    """Count magnitudes of each shard by one digit, the lower low_bits or those above, in every stride-th run of rows.

    By the upper digit: those in which it is at least the shard's limit. By the lower one: those in which the upper is
    that. Zeros are not counted: there may be many, all at one address; of too few others the k-th largest is zero.
    """
    shard = tl.arange(0, shards)[None, :]
    wanted = tl.load(limit + shard, mask=shard < wide, other=0).to(tl.int32)
    first = tl.program_id(0).to(tl.int64) * stride * rows
    for start in range(first, tl.cdiv(size, wide), tl.num_programs(0) * stride * rows):
        bits, _ = _entries(vector, size, start, wide, shards, rows)
        upper = bits >> low_bits
        if lower:
            counted, digit = upper == wanted, bits & ((1 << low_bits) - 1)
        else:
            counted, digit = upper >= wanted, upper
        tl.atomic_add(counts + (shard * bins + digit), 1, mask=counted & (bits > 0), sem="relaxed")


@triton.jit(do_not_specialize=["size", "run"])
def weigh(
    vector: tl.tensor,
    limit: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    size: tl.int64,
    run: tl.int64,
    wide: tl.constexpr,
    shards: tl.constexpr,
    rows: tl.constexpr,
):
    """How many magnitudes of each shard lie above its limit, and how many are equal to it, in each run of rows."""
    program = tl.program_id(0).to(tl.int64)
    shard = tl.arange(0, shards)
    least = tl.load(limit + shard, mask=shard < wide, other=0)
    more, same = tl.zeros((shards,), tl.int64), tl.zeros((shards,), tl.int64)
    last = tl.minimum((program + 1) * run, tl.cdiv(size, wide))
    for start in range(program * run, last, rows):
        bits, _ = _entries(vector, size, start, wide, shards, rows)
        total = tl.sum(_kinds(bits, least[None, :]), axis=0)
        more += total & 0xFFFF
        same += total >> 16
    to = shard * tl.num_programs(0) + program
    tl.store(above + to, more, mask=shard < wide)
    tl.store(equal + to, same, mask=shard < wide)


@triton.jit(do_not_specialize=["size", "run", "count"])
def write(
    vector: tl.tensor,
    limit: tl.tensor,
    ties: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    chosen: tl.tensor,
    values: tl.tensor,
    size: tl.int64,
    run: tl.int64,
    count: tl.int64,
    wide: tl.constexpr,
    shards: tl.constexpr,
    rows: tl.constexpr,
):
    """Write what lies above a shard's limit and the first ``ties`` that are equal to it, in ascending order.

    ``above`` and ``equal`` tell how many of either kind lie before each run of rows.
    """
    program = tl.program_id(0).to(tl.int64)
    shard = tl.arange(0, shards)
    there = shard < wide
    least = tl.load(limit + shard, mask=there, other=0)
    room = tl.load(ties + shard, mask=there, other=0)
    at = shard * tl.num_programs(0) + program
    more, same = tl.load(above + at, mask=there, other=0), tl.load(equal + at, mask=there, other=0)
    last = tl.minimum((program + 1) * run, tl.cdiv(size, wide))
    for start in range(program * run, last, rows):
        bits, value = _entries(vector, size, start, wide, shards, rows)
        kinds = _kinds(bits, least[None, :])
        before = tl.cumsum(kinds, axis=0) - kinds
        same_before = same[None, :] + (before >> 16)
        place = more[None, :] + (before & 0xFFFF) + tl.minimum(same_before, room[None, :])
        taken = ((kinds == 1) | ((kinds > 1) & (same_before < room[None, :]))) & there[None, :] & (place < count)
        to = shard[None, :] * count + place
        row = start + tl.arange(0, rows).to(tl.int64)[:, None]
        tl.store(chosen + to, row + tl.zeros_like(place), mask=taken)
        tl.store(values + to, value, mask=taken)
        total = tl.sum(kinds, axis=0)
        more += total & 0xFFFF
        same += total >> 16
