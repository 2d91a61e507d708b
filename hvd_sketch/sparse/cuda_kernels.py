"""What runs on the GPU to choose from a vector: the Triton kernels that `hvd_sketch.sparse.cuda` launches.

A vector of W shards is seen as rows of W entries, entry i as shard ``i mod W`` of row ``i div W``. A program takes
``rows`` rows of ``shards`` entries at once, of which those beyond W are masked: a power of two of either. A *run* is
the rows of one program of `count` and `collect`. Magnitudes are compared as the integers that their bits are.

For each shard there is a line of int64 numbers, its *state*: see the constants below. What is *looked at* for the k-th
largest are the candidates that `collect` has written, or, if the sample misled, all of the shard.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

LOW, HIGH = tl.constexpr(0), tl.constexpr(1)
"""Of the bracket: all candidates are above low, and what is at least high is chosen, or so the sample says."""
LEFT = tl.constexpr(2)
"""How many entries are looked at."""
RANK = tl.constexpr(3)
"""That of the k-th largest among those that are not known to be larger; and at last among those equal to it."""
FOUND = tl.constexpr(4)
"""The k-th largest less the base, as far as its digits are known."""
BASE = tl.constexpr(5)
SHIFT = tl.constexpr(6)
"""How many bits of it are not known yet."""
TOP = tl.constexpr(7)
"""What is as large as this is known to be chosen."""
COLLECTED = tl.constexpr(8)
"""Whether the candidates are looked at."""
FIELDS = tl.constexpr(16)

_LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _bits(values, inside):
    """The bits of magnitudes, -1 where there is none."""
    return tl.where(inside, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@triton.jit
def _entries(vector, size, start, wide: tl.constexpr, shards: tl.constexpr, rows: tl.constexpr):
    """The entries of some rows, and the bits of their magnitudes."""
    shard = tl.arange(0, shards)[None, :]
    at = tl.arange(0, rows)[:, None] * wide + shard
    left = tl.minimum(size - start * wide, rows * wide).to(tl.int32)
    inside = (shard < wide) & (at < left)
    values = tl.load(vector + start * wide + at, mask=inside, other=0.0)
    return _bits(values, inside), values


@triton.jit
def _kinds(one, other):
    """1 for one kind, 65536 for the other: a sum of fewer than 65536 entries counts both."""
    return one.to(tl.int32) + (other.to(tl.int32) << 16)


@triton.jit(do_not_specialize=["size", "low_rank", "high_rank"])
def bracket(
    vector: tl.tensor,
    state: tl.tensor,
    size: tl.int64,
    low_rank: tl.int64,
    high_rank: tl.int64,
    wide: tl.constexpr,
    sample: tl.constexpr,
):
    """Guess between which magnitudes a shard's k-th largest lies, by two ranks in a sample of it. Grid: shards.

    One entry of each of as many stretches of the shard, never the same one: matrices have a period. Without a high
    rank there is no upper end.
    """
    shard = tl.program_id(0)
    rows = (size - shard + wide - 1) // wide
    step = tl.maximum(rows // sample, 1)
    number = tl.arange(0, sample)
    jitter = ((number.to(tl.uint32) * 0x9E3779B1).to(tl.int64) * step) >> 32
    row = number * step + jitter
    bits = _bits(tl.load(vector + row * wide + shard, mask=row < rows, other=0.0), row < rows)
    low, top = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for bit in tl.range(30, -1, -1):
        one, other = low | (1 << bit), top | (1 << bit)
        both = tl.sum(_kinds(bits >= one, bits >= other))
        low = tl.where((both & 0xFFFF) >= low_rank, one, low)
        top = tl.where((both >> 16) >= high_rank, other, top)
    high = tl.where(high_rank < 1, _LARGEST, tl.minimum(top, _LARGEST - 1) + 1)
    line = state + shard * FIELDS
    tl.store(line + LOW, low.to(tl.int64))
    tl.store(line + HIGH, high.to(tl.int64))


@triton.jit(do_not_specialize=["size", "run"])
def count(
    vector: tl.tensor,
    state: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    chosen: tl.tensor,
    size: tl.int64,
    run: tl.int64,
    wide: tl.constexpr,
    shards: tl.constexpr,
    rows: tl.constexpr,
):
    """Of each shard and run: how many entries lie above the bracket's lower end, at it, and above the upper one.

    Grid: runs.
    """
    program = tl.program_id(0).to(tl.int64)
    shard = tl.arange(0, shards)
    there = shard < wide
    line = state + shard * FIELDS
    low = tl.load(line + LOW, mask=there, other=_LARGEST).to(tl.int32)[None, :]
    high = tl.load(line + HIGH, mask=there, other=_LARGEST).to(tl.int32)[None, :]
    both, same = tl.zeros((rows, shards), tl.int32), tl.zeros((rows, shards), tl.int32)
    last = tl.minimum((program + 1) * run, tl.cdiv(size, wide))
    for start in range(program * run, last, rows):
        bits, _ = _entries(vector, size, start, wide, shards, rows)
        both += _kinds(bits > low, bits >= high)
        same += (bits == low).to(tl.int32)
    to = shard * tl.num_programs(0) + program
    tl.store(above + to, tl.sum((both & 0xFFFF).to(tl.int64), axis=0), mask=there)
    tl.store(equal + to, tl.sum(same.to(tl.int64), axis=0), mask=there)
    tl.store(chosen + to, tl.sum((both >> 16).to(tl.int64), axis=0), mask=there)


@triton.jit(do_not_specialize=["size", "k", "room", "runs"])
def settle(
    state: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    chosen: tl.tensor,
    size: tl.int64,
    k: tl.int64,
    room: tl.int64,
    runs: tl.int64,
    wide: tl.constexpr,
    most_runs: tl.constexpr,
):
    """See whether the sample was right, and what is to be looked at. Grid: shards.

    The candidates, if there are enough of them and not too many. Else all of the shard; and if those equal to the
    bracket's lower end are the missing ones, that is the k-th largest. ``above`` is replaced by the counts of all runs
    before each.
    """
    shard = tl.program_id(0)
    line = state + shard * FIELDS
    run = tl.arange(0, most_runs)
    at = shard * runs + run
    over = tl.load(above + at, mask=run < runs, other=0)
    tl.store(above + at, tl.cumsum(over) - over, mask=run < runs)
    candidates = tl.sum(over)
    sure = tl.sum(tl.load(chosen + at, mask=run < runs, other=0))
    same = tl.sum(tl.load(equal + at, mask=run < runs, other=0))
    low, high = tl.load(line + LOW), tl.load(line + HIGH)
    collected = (candidates >= k) & (candidates <= room)
    ends = (candidates < k) & (candidates + same >= k)
    bounded = collected & (sure < k)
    base = tl.where(collected, low + 1, tl.where(ends, low, 0))
    top = tl.where(bounded, high, 0x80000000)
    known = 0
    for _ in tl.range(0, 31):
        known += (top - base > (1 << known)).to(tl.int32)
    rows = (size - shard + wide - 1) // wide
    tl.store(line + LEFT, tl.where(collected, candidates, rows))
    tl.store(line + RANK, tl.where(ends, k - candidates, tl.where(bounded, k - sure, k)))
    tl.store(line + FOUND, low * 0)
    tl.store(line + BASE, base)
    tl.store(line + SHIFT, tl.where(ends, 0, known).to(tl.int64))
    tl.store(line + TOP, top)
    tl.store(line + COLLECTED, collected.to(tl.int64))


@triton.jit(do_not_specialize=["size", "run", "room"])
def collect(
    vector: tl.tensor,
    state: tl.tensor,
    above: tl.tensor,
    kept_rows: tl.tensor,
    kept: tl.tensor,
    size: tl.int64,
    run: tl.int64,
    room: tl.int64,
    wide: tl.constexpr,
    shards: tl.constexpr,
    rows: tl.constexpr,
):
    """Write the candidates of each shard, in ascending order: their rows and values, ``room`` for each shard.

    Nothing where they are not looked at. Grid: runs.
    """
    program = tl.program_id(0).to(tl.int64)
    shard = tl.arange(0, shards)
    there = shard < wide
    line = state + shard * FIELDS
    low = tl.load(line + LOW, mask=there, other=0).to(tl.int32)
    low = tl.where(tl.load(line + COLLECTED, mask=there, other=0) != 0, low, _LARGEST)[None, :]
    place = tl.load(above + shard * tl.num_programs(0) + program, mask=there, other=0).to(tl.int32) - 1
    kept_rows += shard.to(tl.int64)[None, :] * room
    kept += shard.to(tl.int64)[None, :] * room
    last = tl.minimum((program + 1) * run, tl.cdiv(size, wide))
    for start in range(program * run, last, rows):
        bits, value = _entries(vector, size, start, wide, shards, rows)
        taken = (bits > low).to(tl.int32)
        to = place[None, :] + tl.cumsum(taken, axis=0)
        row = (start + tl.arange(0, rows)).to(tl.int32)[:, None]
        keeps = (taken > 0) & (to < room)
        tl.store(kept_rows + to, row + tl.zeros_like(to), mask=keeps)
        tl.store(kept + to, value, mask=keeps)
        place += tl.sum(taken, axis=0)


@triton.jit
def _looked_at(vector, kept_rows, kept, line, shard, start, room, wide: tl.constexpr, lanes: tl.constexpr):
    """Of what is looked at, from a number on: bits of magnitudes, -1 where there are no more, rows and values."""
    number = start + tl.arange(0, lanes)
    there = number < tl.load(line + LEFT)
    if tl.load(line + COLLECTED) != 0:
        row = tl.load(kept_rows + shard * room + number, mask=there, other=0).to(tl.int64)
        value = tl.load(kept + shard * room + number, mask=there, other=0.0)
    else:
        row = number
        value = tl.load(vector + number * wide + shard, mask=there, other=0.0)
    return _bits(value, there), row, value


@triton.jit(do_not_specialize=["room"])
def count_digits(
    vector: tl.tensor,
    kept_rows: tl.tensor,
    kept: tl.tensor,
    state: tl.tensor,
    counts: tl.tensor,
    room: tl.int64,
    digit_bits: tl.constexpr,
    copies: tl.constexpr,
    wide: tl.constexpr,
    lanes: tl.constexpr,
):
    """Count the values of the next digit, of those whose upper digits are the k-th largest's, and of no zeros.

    ``counts``: of each shard ``copies`` times ``2^digit_bits``, to be added up, so that fewer programs meet at an
    address. Grid: (programs, shards).
    """
    shard = tl.program_id(1).to(tl.int64)
    line = state + shard * FIELDS
    shift, base, found = tl.load(line + SHIFT), tl.load(line + BASE), tl.load(line + FOUND)
    rest = tl.maximum(shift - digit_bits, 0)
    to = counts + ((shard * copies + tl.program_id(0) % copies) << digit_bits)
    left = tl.where(shift > 0, tl.load(line + LEFT), 0)
    top = tl.load(line + TOP)
    for start in range(tl.program_id(0).to(tl.int64) * lanes, left, tl.num_programs(0) * lanes):
        bits, _, _ = _looked_at(vector, kept_rows, kept, line, shard, start, room, wide, lanes)
        number = (bits - base).to(tl.int64)
        counted = (bits > 0) & (bits < top) & ((number >> shift) == found)
        digit = (number >> rest) & ((1 << (shift - rest)) - 1)
        tl.atomic_add(to + digit, 1, mask=counted, sem="relaxed")


@triton.jit
def find_digit(state: tl.tensor, counts: tl.tensor, digit_bits: tl.constexpr, copies: tl.constexpr):
    """Find the next digit of the k-th largest; if it was not counted, it is zero. Grid: shards."""
    shard = tl.program_id(0)
    line = state + shard * FIELDS
    shift, rank, found = tl.load(line + SHIFT), tl.load(line + RANK), tl.load(line + FOUND)
    value = tl.arange(0, 1 << digit_bits)
    copy = tl.arange(0, copies)
    own = tl.sum(tl.load(counts + (((shard * copies + copy[:, None]) << digit_bits) + value[None, :])), axis=0)
    above = tl.sum(own) - tl.cumsum(own)
    here = (above < rank) & ((above + own >= rank) | (value == 0))
    digit = tl.sum(tl.where(here, value, 0))
    rest = tl.maximum(shift - digit_bits, 0)
    if shift > 0:
        tl.store(line + FOUND, (found << (shift - rest)) + digit)
        tl.store(line + RANK, rank - tl.sum(tl.where(here, above, 0)))
        tl.store(line + SHIFT, rest)


@triton.jit
def _part(line, lanes: tl.constexpr):
    """What a program looks at of all that is looked at: from where to where."""
    left = tl.load(line + LEFT)
    part = tl.cdiv(tl.cdiv(left, tl.num_programs(0)), lanes) * lanes
    first = tl.program_id(0).to(tl.int64) * part
    return first, tl.minimum(first + part, left)


@triton.jit(do_not_specialize=["room"])
def weigh(
    vector: tl.tensor,
    kept_rows: tl.tensor,
    kept: tl.tensor,
    state: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    room: tl.int64,
    wide: tl.constexpr,
    lanes: tl.constexpr,
):
    """How much of each part of what is looked at lies above the k-th largest, and is equal to it.

    Grid: (parts, shards).
    """
    shard = tl.program_id(1).to(tl.int64)
    line = state + shard * FIELDS
    least = tl.load(line + BASE) + tl.load(line + FOUND)
    first, last = _part(line, lanes)
    both = tl.zeros((lanes,), tl.int64)
    for start in range(first, last, lanes):
        bits, _, _ = _looked_at(vector, kept_rows, kept, line, shard, start, room, wide, lanes)
        both += (bits > least).to(tl.int64) + ((bits == least).to(tl.int64) << 32)
    total = tl.sum(both)
    to = shard * tl.num_programs(0) + tl.program_id(0)
    tl.store(above + to, total & 0xFFFFFFFF)
    tl.store(equal + to, total >> 32)


@triton.jit(do_not_specialize=["parts"])
def add_up(above: tl.tensor, equal: tl.tensor, parts: tl.int64, most_parts: tl.constexpr):
    """Replace each part's counts by those of all parts before it. Grid: shards."""
    shard = tl.program_id(0)
    part = tl.arange(0, most_parts)
    at = shard * parts + part
    over = tl.load(above + at, mask=part < parts, other=0)
    same = tl.load(equal + at, mask=part < parts, other=0)
    tl.store(above + at, tl.cumsum(over) - over, mask=part < parts)
    tl.store(equal + at, tl.cumsum(same) - same, mask=part < parts)


@triton.jit(do_not_specialize=["room", "k"])
def write(
    vector: tl.tensor,
    kept_rows: tl.tensor,
    kept: tl.tensor,
    state: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    chosen: tl.tensor,
    values: tl.tensor,
    room: tl.int64,
    k: tl.int64,
    wide: tl.constexpr,
    lanes: tl.constexpr,
):
    """Write what lies above a shard's k-th largest, and as many equal to it as are missing, in ascending order.

    ``above`` and ``equal`` tell how many of either kind lie before each part. Grid: (parts, shards).
    """
    shard = tl.program_id(1).to(tl.int64)
    line = state + shard * FIELDS
    least = (tl.load(line + BASE) + tl.load(line + FOUND)).to(tl.int32)
    missing = tl.load(line + RANK)
    at = shard * tl.num_programs(0) + tl.program_id(0)
    more, same = tl.load(above + at), tl.load(equal + at)
    first, last = _part(line, lanes)
    for start in range(first, last, lanes):
        bits, row, value = _looked_at(vector, kept_rows, kept, line, shard, start, room, wide, lanes)
        kinds = _kinds(bits > least, bits == least)
        before = tl.cumsum(kinds) - kinds
        same_before = same + (before >> 16)
        to = more + (before & 0xFFFF) + tl.minimum(same_before, missing)
        taken = ((kinds == 1) | ((kinds > 1) & (same_before < missing))) & (to < k)
        tl.store(chosen + shard * k + to, row, mask=taken)
        tl.store(values + shard * k + to, value, mask=taken)
        total = tl.sum(kinds)
        more += total & 0xFFFF
        same += total >> 16
