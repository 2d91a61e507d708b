"""The code of sparse vectors on the GPU: the bytes of `hvd_sketch.sparse.codec`, by kernels that wait for nobody.

Where a bit is follows from its element alone: the lower bits of eight elements fill as many bytes as there are lower
bits, and the one of element i lies at ``(index >> low_bits) + i``. So both parts are written in parallel; to read, the
ones before each byte are counted first.
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG = 10
_BLOCK = 1 << _LOG
"""Elements, or bytes, that a program takes: a power of two, for sums are in pairs."""
_LEVELS = 8


def encode(codec, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As `SparseCodec.encode`; both tensors are contiguous."""
    vectors, count = values.shape
    device = values.device
    blocks = -(-count // _BLOCK)
    code = torch.empty(vectors, codec.nbytes, dtype=torch.uint8, device=device)
    decoded = torch.empty_like(values)
    ends = torch.zeros(vectors, 2, dtype=torch.int32, device=device)
    sums = torch.empty(vectors, blocks, _LEVELS, dtype=torch.float32, device=device)
    numbers = torch.empty(vectors, blocks, _LEVELS, dtype=torch.int32, device=device)
    means = torch.empty(vectors, _LEVELS, dtype=torch.float32, device=device)
    words = torch.zeros(vectors, -(-codec.high_bits // 32), dtype=torch.int32, device=device)
    grid = (blocks, vectors)
    with torch.cuda.device_of(values):
        find_ends[grid](ends, values, count, lanes=_BLOCK)
        weigh[grid](code, sums, numbers, values, ends, count, codec.nbytes, blocks, log=_LOG, enable_fp_fusion=False)
        while blocks > _BLOCK:
            sums, numbers, blocks = _in_pairs(sums, numbers)
        average[vectors,](code, means, sums, numbers, codec.nbytes, blocks, log=_LOG, enable_fp_fusion=False)
        pack[grid](
            code,
            decoded,
            words,
            indices,
            values,
            means,
            count,
            codec.nbytes,
            codec.value_bytes,
            codec.low_bytes,
            words.shape[1],
            low_bits=codec.low_bits,
            groups=_BLOCK // 8,
        )
    code[:, codec.value_bytes + codec.low_bytes :] = words.view(torch.uint8)[:, : -(-codec.high_bits // 8)]
    return code, decoded


def decode(codec, code: Tensor) -> tuple[Tensor, Tensor]:
    """As `SparseCodec.decode` for a device; the code is contiguous."""
    vectors, device = len(code), code.device
    indices = torch.zeros(vectors, codec.count, dtype=torch.int64, device=device)
    values = torch.full((vectors, codec.count), torch.nan, dtype=torch.float32, device=device)
    high_bytes = -(-codec.high_bits // 8)
    blocks = -(-high_bytes // _BLOCK)
    ones = torch.empty(vectors, blocks, dtype=torch.int64, device=device)
    start = codec.value_bytes + codec.low_bytes
    with torch.cuda.device_of(code):
        bits = 8 * high_bytes  # one that is set behind the last belongs to no code
        count_ones[blocks, vectors](ones, code, codec.nbytes, start, high_bytes, bits, lanes=_BLOCK)
        before = ones.cumsum(1)
        unpack[blocks, vectors](
            indices,
            values,
            code,
            before,
            ones,
            codec.universe,
            codec.count,
            codec.nbytes,
            codec.value_bytes,
            start,
            high_bytes,
            codec.high_bits,
            low_bits=codec.low_bits,
            whole=tl.int32 if max(codec.universe, 8 * codec.nbytes) < 2**31 else tl.int64,
            lanes=_BLOCK,
        )
    return indices, values


def _in_pairs(sums: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, int]:
    """The same of blocks of blocks."""
    vectors, blocks, _ = sums.shape
    fewer = -(-blocks // _BLOCK)
    less, fewer_numbers = (
        torch.empty(vectors, fewer, _LEVELS, dtype=t.dtype, device=t.device) for t in (sums, numbers)
    )
    add_up[fewer, vectors](less, fewer_numbers, sums, numbers, blocks, log=_LOG, enable_fp_fusion=False)
    return less, fewer_numbers, fewer


@triton.jit
def _pairs(x, log: tl.constexpr):
    """Sums over the last axis of (8, 2^log), in pairs of neighbours, these in pairs, and so on."""
    for done in tl.static_range(log):
        x = tl.sum(tl.reshape(x, (8, 1 << (log - 1 - done), 2)), axis=2)
    return tl.reshape(x, (8,))


@triton.jit(do_not_specialize=["count"])
def find_ends(ends: tl.tensor, values: tl.tensor, count: tl.int64, lanes: tl.constexpr):
    """The bits of the largest magnitude, and how far those of the least above zero are below all. Grid: as `weigh`."""
    vector = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    value = tl.load(values + vector * count + at, mask=at < count, other=0.0)
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    end = tl.arange(0, 2)
    both = tl.where(end == 0, tl.max(bits), tl.max(tl.where(bits > 0, 0x7FFFFFFF - bits, 0)))
    tl.atomic_max(ends + 2 * vector + end, both, mask=end < 2, sem="relaxed")


@triton.jit
def _level(bits, ends):
    """The level of each magnitude, given by its bits, from the ends that `find_ends` wrote."""
    magnitude = tl.minimum(bits, 0x7F800000).to(tl.float32, bitcast=True)
    largest = tl.minimum(tl.load(ends), 0x7F800000).to(tl.float32, bitcast=True)  # what is not a number is infinite
    least = tl.minimum(0x7FFFFFFF - tl.load(ends + 1), 0x7F800000).to(tl.float32, bitcast=True)
    least = tl.where(tl.load(ends + 1) == 0, largest, least)
    bound = tl.maximum(tl.maximum(least, largest * 0.0078125), 1.1754943508222875e-38)
    level = (magnitude > 0.0).to(tl.int32)
    for _ in tl.static_range(6):
        bound = bound * 2.0
        level += (magnitude >= bound).to(tl.int32)
    return level


@triton.jit(do_not_specialize=["count", "nbytes", "blocks"])
def weigh(
    code: tl.tensor,
    sums: tl.tensor,
    numbers: tl.tensor,
    values: tl.tensor,
    ends: tl.tensor,
    count: tl.int64,
    nbytes: tl.int64,
    blocks: tl.int64,
    log: tl.constexpr,
):
    """Write the values' nibbles; sum and count the magnitudes of each level in a block. Grid: (blocks, vectors)."""
    block, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lanes: tl.constexpr = 1 << log
    at = block * lanes + tl.arange(0, lanes)
    value = tl.load(values + vector * count + at, mask=at < count, other=0.0)
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    magnitude = bits.to(tl.float32, bitcast=True)
    level = _level(bits, ends + 2 * vector)
    nibble = level + ((value < 0.0).to(tl.int32) << 3)
    pairs = tl.reshape(nibble, (lanes // 2, 2)) << (4 * tl.arange(0, 2)[None, :])
    pair = block * (lanes // 2) + tl.arange(0, lanes // 2)
    to = code + vector * nbytes + 14 + pair
    tl.store(to, tl.sum(pairs, axis=1).to(tl.uint8), mask=2 * pair < count)
    its = level[None, :] == tl.arange(0, 8)[:, None]
    line = (vector * blocks + block) * 8 + tl.arange(0, 8)
    tl.store(sums + line, _pairs(tl.where(its, magnitude[None, :], 0.0), log))
    tl.store(numbers + line, tl.sum((its & (at < count)[None, :]).to(tl.int32), axis=1))


@triton.jit
def _of_blocks(sums, numbers, first, blocks, log: tl.constexpr):
    """Sums and numbers of 2^log blocks from one on, of those that there are."""
    block = tl.arange(0, 1 << log)[None, :]
    level = tl.arange(0, 8)[:, None]
    at, inside = (first + block) * 8 + level, first + block < blocks
    total = _pairs(tl.load(sums + at, mask=inside, other=0.0), log)
    return total, tl.sum(tl.load(numbers + at, mask=inside, other=0), axis=1)


@triton.jit(do_not_specialize=["blocks"])
def add_up(
    less: tl.tensor, fewer: tl.tensor, sums: tl.tensor, numbers: tl.tensor, blocks: tl.int64, log: tl.constexpr
):
    """Add up blocks of blocks. Grid: (blocks of blocks, vectors)."""
    part, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = vector * blocks * 8
    total, number = _of_blocks(sums + start, numbers + start, part << log, blocks, log)
    line = (vector * tl.num_programs(0) + part) * 8 + tl.arange(0, 8)
    tl.store(less + line, total)
    tl.store(fewer + line, number)


@triton.jit
def _rounded(mean):
    """The bits of the nearest numbers that bfloat16 has, of two the even one; infinite only if they were."""
    bits = mean.to(tl.uint32, bitcast=True)
    finite = tl.where(bits < 0x7F800000, tl.minimum(bits, 0x7F7F0000), bits)
    nearest = ((finite + 0x7FFF + ((finite >> 16) & 1)) >> 16) << 16
    return tl.where(bits > 0x7F800000, 0x7FC00000, nearest).to(tl.uint32)


@triton.jit(do_not_specialize=["nbytes", "blocks"])
def average(
    code: tl.tensor,
    means: tl.tensor,
    sums: tl.tensor,
    numbers: tl.tensor,
    nbytes: tl.int64,
    blocks: tl.int64,
    log: tl.constexpr,
):
    """The mean magnitude of each level, rounded, for `pack` and as bytes of the code. Grid: vectors."""
    vector = tl.program_id(0).to(tl.int64)
    start = vector * blocks * 8
    total, number = _of_blocks(sums + start, numbers + start, 0, blocks, log)
    mean = tl.div_rn(total, tl.maximum(number, 1).to(tl.float32))
    word, level = _rounded(mean), tl.arange(0, 8)
    tl.store(means + vector * 8 + level, word.to(tl.float32, bitcast=True))
    byte = tl.arange(0, 2)[None, :]
    to = code + vector * nbytes + 2 * (level[:, None] - 1) + byte
    tl.store(to, ((word[:, None] >> (16 + 8 * byte).to(tl.uint32)) & 255).to(tl.uint8), mask=level[:, None] > 0)


@triton.jit(do_not_specialize=["count", "nbytes", "value_bytes", "low_bytes", "row_words"])
def pack(
    code: tl.tensor,
    decoded: tl.tensor,
    words: tl.tensor,
    indices: tl.tensor,
    values: tl.tensor,
    means: tl.tensor,
    count: tl.int64,
    nbytes: tl.int64,
    value_bytes: tl.int64,
    low_bytes: tl.int64,
    row_words: tl.int64,
    low_bits: tl.constexpr,
    groups: tl.constexpr,
):
    """Write the lower bits of the indices, mark the upper ones in words, and decode the values. Grid: as `weigh`."""
    vector = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * groups + tl.arange(0, groups)
    row = code + vector * nbytes
    for byte in tl.static_range(low_bits):
        packed = tl.zeros((groups,), tl.int32)
        for bit in tl.static_range(8):
            at = group * 8 + (8 * byte + bit) // low_bits
            index = tl.load(indices + vector * count + at, mask=at < count, other=0)
            packed |= ((index >> ((8 * byte + bit) % low_bits)) & 1).to(tl.int32) << (7 - bit)
        to = group * low_bits + byte
        tl.store(row + value_bytes + to, packed.to(tl.uint8), mask=to < low_bytes)
    at = tl.program_id(0).to(tl.int64) * groups * 8 + tl.arange(0, groups * 8)
    there = at < count
    one = (tl.load(indices + vector * count + at, mask=there, other=0) >> low_bits) + at
    mark = 1 << ((one & 24) + 7 - (one & 7)).to(tl.int32)  # the first bit of a byte is its highest
    tl.atomic_or(words + vector * row_words + (one >> 5), mark, mask=there, sem="relaxed")
    nibble = (tl.load(row + 14 + (at >> 1), mask=there, other=0).to(tl.int32) >> (4 * (at & 1)).to(tl.int32)) & 15
    mean = tl.load(means + vector * 8 + (nibble & 7), mask=there, other=0.0)
    tl.store(decoded + vector * count + at, tl.where(nibble > 7, -mean, mean), mask=there)


@triton.jit
def _high(code, at, high_bytes, high_bits):
    """Bytes of the unary part, without what lies behind its last bit."""
    byte = tl.load(code + at, mask=at < high_bytes, other=0).to(tl.int32)
    behind = tl.minimum(tl.maximum(8 * (at + 1) - high_bits, 0), 8).to(tl.int32)
    return (byte >> behind) << behind


@triton.jit
def _ones(byte):
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 15


@triton.jit(do_not_specialize=["nbytes", "start", "high_bytes", "high_bits"])
def count_ones(
    ones: tl.tensor,
    code: tl.tensor,
    nbytes: tl.int64,
    start: tl.int64,
    high_bytes: tl.int64,
    high_bits: tl.int64,
    lanes: tl.constexpr,
):
    """How many ones each block of the unary part has. Grid: (blocks, vectors)."""
    block, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = block * lanes + tl.arange(0, lanes)
    byte = _high(code + vector * nbytes + start, at, high_bytes, high_bits)
    tl.store(ones + vector * tl.num_programs(0) + block, tl.sum(_ones(byte)).to(tl.int64))


@triton.jit(do_not_specialize=["universe", "count", "nbytes", "value_bytes", "start", "high_bytes", "high_bits"])
def unpack(
    indices: tl.tensor,
    values: tl.tensor,
    code: tl.tensor,
    until: tl.tensor,
    ones: tl.tensor,
    universe: tl.int64,
    count: tl.int64,
    nbytes: tl.int64,
    value_bytes: tl.int64,
    start: tl.int64,
    high_bytes: tl.int64,
    high_bits: tl.int64,
    low_bits: tl.constexpr,
    whole: tl.constexpr,
    lanes: tl.constexpr,
):
    """Write indices and values for a block of the unary part; nothing where the ones are too many or too few.

    ``whole``: the type of numbers as large as the universe and as the code has bits.

    ``until``: how many ones there are up to the end of each block. Grid: (blocks, vectors).
    """
    block, vector = tl.program_id(0).to(whole), tl.program_id(1).to(tl.int64)
    row, line = code + vector * nbytes, vector * tl.num_programs(0)
    at = block * lanes + tl.arange(0, lanes)
    right = tl.load(until + line + tl.num_programs(0) - 1) == count
    byte = tl.where(right, _high(row + start, at, high_bytes, high_bits), 0)
    its = _ones(byte)
    before = (tl.load(until + line + block) - tl.load(ones + line + block)).to(whole)
    rank = before + tl.cumsum(its).to(whole) - its
    low_part, last = row + value_bytes, universe.to(whole)
    indices += vector * count
    values += vector * count
    for bit in tl.static_range(8):
        one = (byte >> (7 - bit)) & 1
        low = tl.zeros((lanes,), whole)
        first = rank * low_bits
        for number in tl.static_range(low_bits):
            place = first + number
            piece = tl.load(low_part + (place >> 3), mask=one > 0, other=0).to(tl.int32)
            low |= ((piece >> (7 - (place & 7)).to(tl.int32)) & 1).to(whole) << number
        index = ((at * 8 + bit - rank) << low_bits) | low
        nibble = tl.load(row + 14 + (rank >> 1), mask=one > 0, other=0).to(tl.int32) >> (4 * (rank & 1)).to(tl.int32)
        level = nibble & 7
        mean = tl.zeros((lanes,), tl.uint32)
        for number in tl.static_range(2):
            piece = tl.load(row + 2 * (level - 1) + number, mask=(one > 0) & (level > 0), other=0).to(tl.uint32)
            mean |= piece << (16 + 8 * number)
        sign = ((nibble >> 3) & 1).to(tl.uint32) << 31
        value = (mean ^ sign).to(tl.float32, bitcast=True)
        known = index < last
        tl.store(indices + rank, tl.where(known, index, 0).to(tl.int64), mask=one > 0)
        tl.store(values + rank, tl.where(known, value, float("nan")), mask=one > 0)
        rank += one
