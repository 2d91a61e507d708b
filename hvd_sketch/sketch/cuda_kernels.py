"""What runs on the GPU: the Triton kernels that `hvd_sketch.sketch.cuda` launches.

What is drawn for a chunk is drawn once, by `draw`, and kept as ``draws``, int32 of shape ``(2 + rows, chunks)``: the
tile, the key of the sign words, and each row's offset. The other kernels hash 32 bits for each coordinate and row.
What they take together is part of a block: lane by lane, coordinates that follow each other. In the passes over all
estimates a line of 64 lanes is a piece, of which one chunk has all.

Signs are applied by flipping the sign bit, so no product is followed by a sum that a compiler could fuse with it, and
every result has the bits of `hvd_sketch.sketch.reference`.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix64(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def _drawn(seed, number, index):
    """32 bits for each index, as int64: the number-th of what is drawn for it."""
    start = _mix64(seed.to(tl.uint64) + (number // 2).to(tl.uint64) * 0xD1B54A32D192ED03)
    word = _mix64(start ^ index.to(tl.uint64))
    return (tl.where(number % 2 == 0, word >> 32, word) & 0xFFFFFFFF).to(tl.int64)


@triton.jit
def _below(bits, bound):
    return (bits * bound) >> 32


@triton.jit(do_not_specialize=["seed", "first", "chunks", "width", "tiles"])
def draw(
    draws: tl.tensor,
    seed: tl.int64,
    first: tl.int64,
    chunks: tl.int64,
    width: tl.int64,
    tiles: tl.int64,
    lanes: tl.constexpr,
):
    """Fill ``draws`` for the chunks ``first, first + 1, …``. Grid: (cdiv(chunks, lanes), 2 + rows)."""
    line = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    chunk = first + column
    if line == 0:
        rotation = _below(_drawn(seed, line + (1 << 21), chunk // tiles), tiles)
        word = (chunk % tiles + rotation) % tiles
    elif line == 1:
        word = _drawn(seed, line - 1, chunk)
    else:
        word = _below(_drawn(seed, line - 1, chunk), width)
    tl.store(draws + line * chunks + column, word.to(tl.int32), mask=column < chunks)


@triton.jit
def _flip(value, key, piece, place, row, rows: tl.constexpr):
    """The value with the sign that a place of a piece has in this row; one word has signs for 16 // rows pieces."""
    together: tl.constexpr = 16 // rows
    word = _mix32(key.to(tl.uint32, bitcast=True) + (piece // together * 64 + place).to(tl.uint32))
    sign = (word << (piece % together * rows + row).to(tl.uint32)) & 0x80000000
    return (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _wrapped(number, bound):
    """A number from -bound to bound - 1, modulo the bound."""
    return tl.where(number < 0, number + bound, number)


@triton.jit(do_not_specialize=["blocks", "rows", "width", "length", "tiles", "parts"])
def list_chunks(
    counts: tl.tensor,
    starts: tl.tensor,
    listed: tl.tensor,
    draws: tl.tensor,
    blocks: tl.int64,
    rows: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    parts: tl.int64,
    lanes: tl.constexpr,
    together: tl.constexpr,
    most_parts: tl.constexpr,
    lists: tl.constexpr,
):
    """Of each part of lanes columns of a tile and row: which chunks have something for it, in ascending order.

    Without ``lists`` only ``counts`` is written; with it, ``starts`` says where the list of each part begins.
    ``together`` blocks are looked at at once. Grid: rows * tiles.
    """
    program = tl.program_id(0).to(tl.int64)
    row, tile = program % rows, program // rows
    span, size = width.to(tl.int32), length.to(tl.int32)
    part = tl.arange(0, most_parts)
    line = program * parts + part
    number = tl.zeros((most_parts,), tl.int32)
    if lists:
        start = tl.load(starts + line, mask=part < parts, other=0)
    for first in range(0, blocks, together):
        block = first + tl.arange(0, together)
        there = block < blocks
        slot = _wrapped(tile - tl.load(draws + block * tiles, mask=there, other=0), tiles)
        chunk = block * tiles + slot
        shift = tl.load(draws + (2 + row) * blocks * tiles + chunk, mask=there, other=0)
        ahead = _wrapped(part[None, :] * lanes - shift[:, None], span)
        meets = (there[:, None] & (part < parts)[None, :]) & ((ahead < size) | (ahead + lanes > span))
        met = meets.to(tl.int32)
        if lists:
            at = (start + number)[None, :] + tl.cumsum(met, axis=0) - met
            tl.store(listed + at, chunk.to(tl.int32)[:, None] + tl.zeros_like(met), mask=meets)
        number += tl.sum(met, axis=0)
    if not lists:
        tl.store(counts + line, number, mask=part < parts)


@triton.jit(do_not_specialize=["first", "offset", "count", "blocks", "cols", "width", "length", "tiles", "parts"])
def add(
    table: tl.tensor,
    draws: tl.tensor,
    vector: tl.tensor,
    scale: tl.tensor,
    counts: tl.tensor,
    starts: tl.tensor,
    listed: tl.tensor,
    first: tl.int64,
    offset: tl.int64,
    count: tl.int64,
    blocks: tl.int64,
    cols: tl.int64,
    width: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    parts: tl.int64,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    ahead: tl.constexpr,
):
    """Add the vector to the table; ``first`` is the chunk with which ``draws`` begins, and a block too.

    A program keeps lanes columns of one tile and row in registers and adds to them, in order, what each chunk on their
    list has for them, the values of ``ahead`` chunks on their way at once. Programs of one tile follow each other, so
    they read the same chunks at the same time, from the cache. Grid: rows * parts * tiles.
    """
    program = tl.program_id(0).to(tl.int64)
    row, part, tile = program % rows, program // rows % parts, program // rows // parts
    span, size, stride = width.to(tl.int32), length.to(tl.int32), (tiles * 64).to(tl.int32)
    column = (part * lanes).to(tl.int32) + tl.arange(0, lanes)
    inside = column < span
    cells = table + (row * cols + tile * width) + column
    sums = tl.load(cells, mask=inside)
    factor = tl.load(scale)
    line = (tile * rows + row) * parts + part
    begin = tl.load(starts + line)
    end = begin + tl.load(counts + line)
    for start in range(begin, end, ahead):
        added, taken = (), ()
        for number in tl.static_range(ahead):
            there = start + number < end
            chunk = tl.load(listed + start + number, mask=there, other=0)
            key = tl.load(draws + blocks * tiles + chunk)
            shift = tl.load(draws + (2 + row) * blocks * tiles + chunk)
            block = chunk // tiles.to(tl.int32)
            slot = chunk - block * tiles.to(tl.int32)
            position = _wrapped(column - shift, span)
            base = first * length + block.to(tl.int64) * (tiles * length) + slot * 64 - offset
            at = base + (position // 64 * stride + position % 64)
            used = inside & (position < tl.where(there, size, 0)) & (at >= 0) & (at < count)
            value = tl.load(vector + at, mask=used, other=0.0).to(tl.float32) * factor
            added += (_flip(value, key, position // 64, position % 64, row.to(tl.int32), rows),)
            taken += (used,)
        for number in tl.static_range(ahead):
            sums = tl.where(taken[number], sums + added[number], sums)
    tl.store(cells, sums, mask=inside)


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
        values += (_flip(value, key, piece[:, None], within, tl.full((), row, tl.int32), row_count),)
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
