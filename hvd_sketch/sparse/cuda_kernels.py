"""What runs on the GPU to choose from a vector: the Triton kernels that `hvd_sketch.sparse.cuda` launches.

A vector of W shards is seen as rows of W entries, entry i as shard ``i mod W`` of row ``i div W``. A program takes
``rows`` rows of ``shards`` entries at once, of which those beyond W are masked: a power of two of either. A *run* is
the rows of one program of `sift` and `write`. Magnitudes are compared as the integers that their bits are.

For each shard there is a line of int64 numbers, its *state*: see the constants below.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

LOW, HIGH = tl.constexpr(0), tl.constexpr(1)
"""Of the bracket: what is chosen is at least low, everything of at least high is chosen, or so the sample says."""
INSIDE = tl.constexpr(2)
"""How many magnitudes lie between the two."""
LEFT = tl.constexpr(3)
"""How many magnitudes have still to be looked at for the k-th largest; 0 when it is known."""
RANK = tl.constexpr(4)
"""That of the k-th largest among them, from 1; and at last among those equal to it."""
FOUND = tl.constexpr(5)
"""The k-th largest less the base, as far as its digits are known; and at last the k-th largest."""
BASE = tl.constexpr(6)
SHIFT = tl.constexpr(7)
"""How many bits of it are not known yet."""
BRACKETED = tl.constexpr(8)
"""Whether the sample was right, so that only what was inside the bracket is looked at; else everything is."""
FIELDS = tl.constexpr(16)

_LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _magnitudes(vector, at, inside):
    """The bits of the magnitudes of some entries, -1 where there is none."""
    values = tl.load(vector + at, mask=inside, other=0.0)
    return tl.where(inside, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1), values


@triton.jit
def _entries(vector, size, start, wide: tl.constexpr, shards: tl.constexpr, rows: tl.constexpr):
    """The same of some rows, and the values."""
    shard = tl.arange(0, shards)[None, :]
    at = tl.arange(0, rows)[:, None] * wide + shard
    left = tl.minimum(size - start * wide, rows * wide).to(tl.int32)
    return _magnitudes(vector + start * wide, at, (shard < wide) & (at < left))


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
    bits, _ = _magnitudes(vector, row * wide + shard, row < rows)
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
    tl.store(line + INSIDE, 0)


@triton.jit(do_not_specialize=["size", "run", "room"])
def sift(
    vector: tl.tensor,
    state: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    kept: tl.tensor,
    kept_run: tl.tensor,
    size: tl.int64,
    run: tl.int64,
    room: tl.int64,
    wide: tl.constexpr,
    shards: tl.constexpr,
    rows: tl.constexpr,
):
    """Count what lies above the bracket and at its lower end, and keep what lies inside, as far as there is room.

    ``above`` and ``equal``: of each shard and run. ``kept``: bits of magnitudes, in any order, and ``kept_run``, in
    which run they lie, both ``room`` for each shard. Grid: runs.
    """
    program = tl.program_id(0).to(tl.int64)
    shard = tl.arange(0, shards)
    there = shard < wide
    line = state + shard * FIELDS
    low = tl.load(line + LOW, mask=there, other=0).to(tl.int32)[None, :]
    high = tl.load(line + HIGH, mask=there, other=0).to(tl.int32)[None, :]
    more, same = tl.zeros((shards,), tl.int64), tl.zeros((shards,), tl.int64)
    last = tl.minimum((program + 1) * run, tl.cdiv(size, wide))
    for start in range(program * run, last, rows):
        bits, _ = _entries(vector, size, start, wide, shards, rows)
        total = tl.sum(_kinds((bits >= high) & there[None, :], bits == low), axis=0)
        more += total & 0xFFFF
        same += total >> 16
        inside = (bits > low) & (bits < high)
        place = tl.cumsum(inside.to(tl.int32), axis=0)
        number = tl.sum(inside.to(tl.int32), axis=0).to(tl.int64)
        before = tl.atomic_add(line + INSIDE, number, mask=there & (number > 0), sem="relaxed")
        to = before[None, :] + place - 1
        keeps = inside & (to < room)
        tl.store(kept + (shard[None, :] * room + to), bits, mask=keeps)
        tl.store(kept_run + (shard[None, :] * room + to), (program + tl.zeros_like(to)).to(tl.int32), mask=keeps)
    to = shard * tl.num_programs(0) + program
    tl.store(above + to, more, mask=there)
    tl.store(equal + to, same, mask=there)


@triton.jit(do_not_specialize=["size", "count", "room", "runs"])
def settle(
    state: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    size: tl.int64,
    count: tl.int64,
    room: tl.int64,
    runs: tl.int64,
    wide: tl.constexpr,
    most_runs: tl.constexpr,
):
    """See whether the sample was right, and what is left to be looked at. Grid: shards.

    If it was wrong, that is the whole shard. If the count-th largest is the bracket's lower end, it is nothing.
    """
    shard = tl.program_id(0)
    line = state + shard * FIELDS
    run = tl.arange(0, most_runs)
    at = shard * runs + run
    over = tl.load(above + at, mask=run < runs, other=0)
    same = tl.load(equal + at, mask=run < runs, other=0)
    low, high, inside = tl.load(line + LOW), tl.load(line + HIGH), tl.load(line + INSIDE)
    rank = count - tl.sum(over)
    right = (rank > 0) & (inside <= room) & (rank <= inside + tl.sum(same))
    ends = right & (rank > inside)
    tl.store(above + at, tl.where(right, over, 0), mask=run < runs)
    tl.store(equal + at, tl.where(ends, same, 0), mask=run < runs)
    rows = (size - shard + wide - 1) // wide
    span = tl.where(right, high - low, 0x80000000)
    known = 0
    for _ in tl.range(0, 31):
        known += (span > (1 << known)).to(tl.int32)
    tl.store(line + LEFT, tl.where(ends, 0, tl.where(right, inside, rows)))
    tl.store(line + RANK, tl.where(ends, rank - inside, tl.where(right, rank, count)))
    tl.store(line + FOUND, low * 0)
    tl.store(line + BASE, tl.where(right, low, 0))
    tl.store(line + SHIFT, tl.where(ends, 0, known).to(tl.int64))
    tl.store(line + BRACKETED, right.to(tl.int64))


@triton.jit
def _looked_at(vector, kept, line, shard, start, room, wide: tl.constexpr, lanes: tl.constexpr):
    """Bits of the magnitudes that are left to be looked at, from a number on; -1 where there are no more."""
    number = start + tl.arange(0, lanes)
    there = number < tl.load(line + LEFT)
    if tl.load(line + BRACKETED) != 0:
        bits = tl.load(kept + shard * room + number, mask=there, other=-1)
    else:
        bits, _ = _magnitudes(vector, number * wide + shard, there)
    return bits, number, there


@triton.jit(do_not_specialize=["room"])
def count_digits(
    vector: tl.tensor,
    kept: tl.tensor,
    state: tl.tensor,
    counts: tl.tensor,
    room: tl.int64,
    digit_bits: tl.constexpr,
    copies: tl.constexpr,
    wide: tl.constexpr,
    lanes: tl.constexpr,
):
    """Count the values of the next digit, of those whose upper digits are the k-th largest's.

    ``counts``: of each shard ``copies`` times ``2^digit_bits``, to be added up, so that fewer programs meet at an
    address. Grid: (programs, shards).
    """
    shard = tl.program_id(1).to(tl.int64)
    line = state + shard * FIELDS
    shift, base, found = tl.load(line + SHIFT), tl.load(line + BASE), tl.load(line + FOUND)
    rest = tl.maximum(shift - digit_bits, 0)
    to = counts + ((shard * copies + tl.program_id(0) % copies) << digit_bits)
    left = tl.where(shift > 0, tl.load(line + LEFT), 0)
    for start in range(tl.program_id(0).to(tl.int64) * lanes, left, tl.num_programs(0) * lanes):
        bits, _, there = _looked_at(vector, kept, line, shard, start, room, wide, lanes)
        number = bits - base
        counted = there & ((number >> shift) == found)
        digit = (number >> rest) & ((1 << (shift - rest)) - 1)
        tl.atomic_add(to + digit, 1, mask=counted, sem="relaxed")


@triton.jit
def find_digit(state: tl.tensor, counts: tl.tensor, digit_bits: tl.constexpr, copies: tl.constexpr):
    """Find the next digit of the k-th largest. Grid: shards."""
    shard = tl.program_id(0)
    line = state + shard * FIELDS
    shift, rank, found = tl.load(line + SHIFT), tl.load(line + RANK), tl.load(line + FOUND)
    value = tl.arange(0, 1 << digit_bits)
    copy = tl.arange(0, copies)
    own = tl.sum(tl.load(counts + (((shard * copies + copy[:, None]) << digit_bits) + value[None, :])), axis=0)
    above = tl.sum(own) - tl.cumsum(own)
    here = (above < rank) & (above + own >= rank)
    digit = tl.sum(tl.where(here, value, 0))
    rest = tl.maximum(shift - digit_bits, 0)
    if shift > 0:
        tl.store(line + FOUND, (found << (shift - rest)) + digit)
        tl.store(line + RANK, rank - tl.sum(tl.where(here, above, 0)))
        tl.store(line + SHIFT, rest)


@triton.jit(do_not_specialize=["room", "run", "runs"])
def tally(
    vector: tl.tensor,
    kept: tl.tensor,
    kept_run: tl.tensor,
    state: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    room: tl.int64,
    run: tl.int64,
    runs: tl.int64,
    wide: tl.constexpr,
    lanes: tl.constexpr,
):
    """Of what was looked at: count in each run what lies above the k-th largest, and what is equal to it.

    Where the k-th largest is the bracket's lower end, all that was inside lies above. Grid: (programs, shards).
    """
    shard = tl.program_id(1).to(tl.int64)
    line = state + shard * FIELDS
    least = tl.load(line + BASE) + tl.load(line + FOUND)
    bracketed = tl.load(line + BRACKETED) != 0
    number_of_all = tl.where(bracketed, tl.load(line + INSIDE), tl.load(line + LEFT))
    for start in range(tl.program_id(0).to(tl.int64) * lanes, number_of_all, tl.num_programs(0) * lanes):
        number = start + tl.arange(0, lanes)
        there = number < number_of_all
        if bracketed:
            bits = tl.load(kept + shard * room + number, mask=there, other=-1)
            its = tl.load(kept_run + shard * room + number, mask=there, other=0).to(tl.int64)
        else:
            bits, _ = _magnitudes(vector, number * wide + shard, there)
            its = number // run
        tl.atomic_add(above + shard * runs + its, 1, mask=there & (bits > least), sem="relaxed")
        tl.atomic_add(equal + shard * runs + its, 1, mask=there & (bits == least), sem="relaxed")


@triton.jit(do_not_specialize=["runs"])
def add_up(state: tl.tensor, above: tl.tensor, equal: tl.tensor, runs: tl.int64, most_runs: tl.constexpr):
    """Replace each run's counts by those of all runs before it. Grid: shards."""
    shard = tl.program_id(0)
    run = tl.arange(0, most_runs)
    at = shard * runs + run
    over = tl.load(above + at, mask=run < runs, other=0)
    same = tl.load(equal + at, mask=run < runs, other=0)
    tl.store(above + at, tl.cumsum(over) - over, mask=run < runs)
    tl.store(equal + at, tl.cumsum(same) - same, mask=run < runs)


@triton.jit(do_not_specialize=["size", "run", "count"])
def write(
    vector: tl.tensor,
    state: tl.tensor,
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
    """Write what lies above a shard's k-th largest, and as many equal to it as are missing, in ascending order.

    ``above`` and ``equal`` tell how many of either kind lie before each run.
    """
    program = tl.program_id(0).to(tl.int64)
    shard = tl.arange(0, shards)
    there = shard < wide
    line = state + shard * FIELDS
    least = tl.load(line + BASE, mask=there, other=0) + tl.load(line + FOUND, mask=there, other=0)
    least = least.to(tl.int32)[None, :]
    room = tl.load(line + RANK, mask=there, other=0)[None, :]
    at = shard * tl.num_programs(0) + program
    more, same = tl.load(above + at, mask=there, other=0), tl.load(equal + at, mask=there, other=0)
    last = tl.minimum((program + 1) * run, tl.cdiv(size, wide))
    for start in range(program * run, last, rows):
        bits, value = _entries(vector, size, start, wide, shards, rows)
        kinds = _kinds(bits > least, bits == least)
        before = tl.cumsum(kinds, axis=0) - kinds
        same_before = same[None, :] + (before >> 16)
        place = more[None, :] + (before & 0xFFFF) + tl.minimum(same_before, room)
        taken = ((kinds == 1) | ((kinds > 1) & (same_before < room))) & there[None, :] & (place < count)
        to = shard[None, :] * count + place
        row = start + tl.arange(0, rows).to(tl.int64)[:, None]
        tl.store(chosen + to, row + tl.zeros_like(place), mask=taken)
        tl.store(values + to, value, mask=taken)
        total = tl.sum(kinds, axis=0)
        more += total & 0xFFFF
        same += total >> 16
