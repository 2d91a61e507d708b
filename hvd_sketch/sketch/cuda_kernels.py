"""What runs on the GPU to choose from a sketch: the Triton kernels that `hvd_sketch.sketch.cuda` launches.

What they take together is part of a block: lane by lane, coordinates that follow each other. In the passes over all
estimates a line of 64 lanes is a piece, of which one chunk has all. What is drawn for chunks comes from
`hvd_sketch.sketch.geometry_cuda`.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from hvd_sketch.sketch.geometry_cuda import flip


@triton.jit
def _median(values, row_count: tl.constexpr):
    """Of the rows' tensors, as a stable sort has it: only neighbours change places."""
    for end in tl.static_range(row_count - 1, (row_count - 1) // 2 - 1, -1):
        for j in tl.static_range(end):
            low, high = values[j], values[j + 1]
            swap = high < low
            pair = (tl.where(swap, high, low), tl.where(swap, low, high))
            values = values[:j] + pair + values[j + 2 :]
    if row_count % 2 == 1:
        return values[row_count // 2]
    return (values[row_count // 2 - 1] + values[row_count // 2]) * 0.5


@triton.jit
def _estimates(
    table, draws, dim, cols, width, length, tiles, chunks, step, row_count: tl.constexpr, lanes: tl.constexpr
):
    """Of a step's coordinates: which they are, their estimates, and which of them there are, a piece in each line.

    A block has as many steps as it has times lanes coordinates.
    """
    span, size, turns = width.to(tl.int32), (tiles * length).to(tl.int32), tiles.to(tl.int32)
    steps = (size + lanes - 1) // lanes
    block = step // steps
    dealt = (step % steps).to(tl.int32) * (lanes // 64) + tl.arange(0, lanes // 64)
    within = tl.arange(0, 64)[None, :]
    place = dealt[:, None] * 64 + within
    index = block * size + place
    inside = (place < size) & (index < dim)
    there = dealt * 64 < size
    piece = dealt // turns
    chunk = block * tiles + (dealt - piece * turns)
    tile = tl.load(draws + chunk, mask=there, other=0).to(tl.int64) * width
    key = tl.load(draws + chunks + chunk, mask=there, other=0)[:, None]
    values = ()
    for row in tl.static_range(row_count):
        column = (piece * 64 + tl.load(draws + (2 + row) * chunks + chunk, mask=there, other=0))[:, None] + within
        column = tl.where(column < span, column, column - span)
        value = tl.load(table + ((row * cols + tile)[:, None] + column), mask=inside, other=0.0)
        values += (flip(value, key, piece[:, None], within, tl.full((), row, tl.int32), row_count),)
    return index, _median(values, row_count), inside


@triton.jit
def _before(kind):
    """Sums of all entries before each, line by line."""
    totals = tl.sum(kind, axis=1)
    return (tl.cumsum(totals, axis=0) - totals)[:, None] + tl.cumsum(kind, axis=1) - kind


@triton.jit
def _magnitude(estimate):
    """The bits of the absolute value, which are ordered as the values are."""
    return estimate.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _kind(bits, least, inside):
    """1 for what lies above the limit, 65536 for what is equal to it: one sum of fewer lanes counts both."""
    return (inside & (bits > least)).to(tl.int32) + ((inside & (bits == least)).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["dim", "cols", "width", "length", "tiles", "chunks", "steps"])
def estimate_all(
    table: tl.tensor,
    draws: tl.tensor,
    to: tl.tensor,
    dim: tl.int64,
    cols: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    chunks: tl.int64,
    steps: tl.int64,
    row_count: tl.constexpr,
    lanes: tl.constexpr,
):
    """Write all estimates. Grid: steps."""
    step = tl.program_id(0).to(tl.int64)
    index, estimate, inside = _estimates(table, draws, dim, cols, width, length, tiles, chunks, step, row_count, lanes)
    tl.store(to + index, estimate, mask=inside)


@triton.jit(do_not_specialize=["dim", "cols", "width", "length", "tiles", "chunks", "steps", "stride"])
def count_digits(
    table: tl.tensor,
    draws: tl.tensor,
    counts: tl.tensor,
    limit: tl.tensor,
    dim: tl.int64,
    cols: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    chunks: tl.int64,
    steps: tl.int64,
    stride: tl.int64,
    lower: tl.constexpr,
    low_bits: tl.constexpr,
    copies: tl.constexpr,
    bins: tl.constexpr,
    row_count: tl.constexpr,
    lanes: tl.constexpr,
):
    """Count magnitudes by one digit, the lower low_bits or those above, in the steps ``0, stride, 2 stride, …``.

    By the upper digit: those in which it is at least ``limit[0]`` and below ``limit[1]``. By the lower one: those in
    which the upper is ``limit[0]``. ``counts``: ``copies`` times ``bins``, so that fewer programs meet at an address.
    Zeros are not counted: there may be many, all at one address; of too few others the k-th largest is zero anyway.
    """
    begin = tl.program_id(0).to(tl.int64) * stride
    wanted, beyond = tl.load(limit).to(tl.int32), tl.load(limit + 1).to(tl.int32)
    counts += tl.program_id(0) % copies * bins
    for step in range(begin, tl.where(wanted < beyond, steps, 0), tl.num_programs(0) * stride):
        _, estimate, inside = _estimates(table, draws, dim, cols, width, length, tiles, chunks, step, row_count, lanes)
        bits = _magnitude(estimate)
        upper = bits >> low_bits
        if lower:
            counted, digit = upper == wanted, bits & ((1 << low_bits) - 1)
        else:
            counted, digit = (upper >= wanted) & (upper < beyond), upper
        tl.atomic_add(counts + digit, 1, mask=inside & counted & (bits > 0), sem="relaxed")


@triton.jit
def _run(program, run, steps, least):
    """The steps of a program, from and to; none where the limit is negative."""
    begin = program * run
    return begin, tl.where(least < 0, begin, tl.minimum(begin + run, steps))


@triton.jit(do_not_specialize=["dim", "cols", "width", "length", "tiles", "chunks", "steps", "run"])
def weigh(
    table: tl.tensor,
    draws: tl.tensor,
    limit: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    dim: tl.int64,
    cols: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    chunks: tl.int64,
    steps: tl.int64,
    run: tl.int64,
    row_count: tl.constexpr,
    lanes: tl.constexpr,
):
    """How many magnitudes of each run of steps lie above the limit, and how many are equal to it. Grid: runs."""
    program = tl.program_id(0).to(tl.int64)
    least = tl.load(limit)
    begin, last = _run(program, run, steps, least)
    more, same = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for step in range(begin, last):
        _, estimate, inside = _estimates(table, draws, dim, cols, width, length, tiles, chunks, step, row_count, lanes)
        bits = _magnitude(estimate)
        total = tl.sum(_kind(bits, least, inside))
        more += total & 0xFFFF
        same += total >> 16
    tl.store(above + program, more)
    tl.store(equal + program, same)


@triton.jit(do_not_specialize=["dim", "cols", "width", "length", "tiles", "chunks", "steps", "run", "room"])
def collect(
    table: tl.tensor,
    draws: tl.tensor,
    limit: tl.tensor,
    above: tl.tensor,
    kept_indices: tl.tensor,
    kept: tl.tensor,
    dim: tl.int64,
    cols: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    chunks: tl.int64,
    steps: tl.int64,
    run: tl.int64,
    room: tl.int64,
    row_count: tl.constexpr,
    lanes: tl.constexpr,
):
    """Write index and estimate of what lies above the limit, in ascending order, as far as there is room.

    ``above`` tells how many lie before each run of steps. Grid: runs.
    """
    program = tl.program_id(0).to(tl.int64)
    least, place = tl.load(limit), tl.load(above + program)
    begin, last = _run(program, run, steps, least)
    for step in range(begin, last):
        index, estimate, inside = _estimates(
            table, draws, dim, cols, width, length, tiles, chunks, step, row_count, lanes
        )
        taken = (inside & (_magnitude(estimate) > least)).to(tl.int32)
        to = place + _before(taken)
        keeps = (taken > 0) & (to < room)
        tl.store(kept_indices + to, index.to(tl.int32), mask=keeps)
        tl.store(kept + to, estimate, mask=keeps)
        place += tl.sum(taken)


@triton.jit(do_not_specialize=["dim", "cols", "width", "length", "tiles", "chunks", "steps", "k", "run"])
def write(
    table: tl.tensor,
    draws: tl.tensor,
    limit: tl.tensor,
    ties: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    indices: tl.tensor,
    estimates: tl.tensor,
    dim: tl.int64,
    cols: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    chunks: tl.int64,
    steps: tl.int64,
    k: tl.int64,
    run: tl.int64,
    row_count: tl.constexpr,
    lanes: tl.constexpr,
):
    """Write what lies above the limit and the first ``ties[0]`` that are equal to it, in ascending order.

    ``above`` and ``equal`` tell how many of either kind lie before each run of steps. Nothing is written beyond k,
    whatever the table holds: with NaN in it the passes need not agree.
    """
    program = tl.program_id(0).to(tl.int64)
    least, room = tl.load(limit), tl.load(ties)
    begin, last = _run(program, run, steps, least)
    more, same = tl.load(above + program), tl.load(equal + program)
    for step in range(begin, last):
        index, estimate, inside = _estimates(
            table, draws, dim, cols, width, length, tiles, chunks, step, row_count, lanes
        )
        bits = _magnitude(estimate)
        if tl.max(tl.where(inside, bits, -1)) >= least:
            kind = _kind(bits, least, inside)
            before = _before(kind)
            same_before = same + (before >> 16)
            at = more + (before & 0xFFFF) + tl.minimum(same_before, room)
            taken = ((kind == 1) | ((kind > 1) & (same_before < room))) & (at < k)
            tl.store(indices + at, index, mask=taken)
            tl.store(estimates + at, estimate, mask=taken)
            total = tl.sum(kind)
            more += total & 0xFFFF
            same += total >> 16
