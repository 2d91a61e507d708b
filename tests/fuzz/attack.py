"""Generated calls of the kernel, compared with the reference: ``python -m tests.fuzz.attack SECONDS FIRST FILE``.

Every case is drawn from its number alone, which is in FILE while it runs. Inputs end where their memory ends, so that
a sanitizer sees the first byte that is read or written beyond.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from hvd_sketch import native
from hvd_sketch.layout import Layout
from hvd_sketch.mixing import Mixing
from hvd_sketch.sketch import Geometry, reference
from hvd_sketch.sketch import native as sketch
from hvd_sketch.sketch.geometry import TILE_WIDTH
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.codec import SparseCodec
from hvd_sketch.sparse.comb import comb
from hvd_sketch.sparse.heaviest import _reference, heaviest_of_shards
from hvd_sketch.sparse.rows import Rows
from tests.support.without_kernel import without_kernel

SPECIAL = (0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
SIZES = (1, 2, 3, 31, 61, 64, 127, 251, 256, 257, 509, 1021, 4096, 8191, 20_011, 150_001)
COLUMNS = (1, 2, 7, 63, 255, 256, 257, TILE_WIDTH - 1, TILE_WIDTH, 2 * TILE_WIDTH - 1, 2 * TILE_WIDTH, 9001)
SIDES = (1, 2, 3, 12, 48, 61, 64, 96, 127, 160, 328)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def numbers(draw: random.Random, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many magnitudes, perhaps some not finite; perhaps misaligned, and ending with their memory."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    skipped = draw.randrange(5)
    values = torch.randn(skipped + count, generator=generator) * 10.0 ** draw.choice((-42, -3, 0, 0, 37))
    if draw.random() < 0.3:
        values = values.sign()
    special = torch.tensor(SPECIAL[: draw.choice((3, 5, 7, 9, 10))])
    kind = torch.randint(len(special), values.shape, generator=generator)
    chosen = torch.rand(values.shape, generator=generator) < draw.choice((0.0, 0.0, 0.1, 1.0))
    return torch.where(chosen, special[kind], values).to(dtype)[skipped:]


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal bits, but for which NaN it is."""
    bits, others = ours.contiguous().view(torch.int32), theirs.contiguous().view(torch.int32)
    return bool(((bits == others) | (ours.isnan() & theirs.isnan())).all())


def ascending(draw: random.Random, count: int, below: int) -> Tensor:
    """So many different numbers, in order."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    return torch.randperm(below, generator=generator)[:count].sort().values


def attack_sketch(draw: random.Random) -> None:
    """Adding, estimating, choosing."""
    dim, rows = draw.choice(SIZES), draw.choice((1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 70))
    geometry, seed = Geometry(dim, rows, draw.choice(COLUMNS)), draw.getrandbits(64)
    start = draw.choice((0, draw.randrange(dim)))
    vector = numbers(draw, draw.choice((dim - start, draw.randrange(dim - start + 1))), draw.choice(DTYPES))
    ours = numbers(draw, rows * geometry.cols).clone().view(rows, geometry.cols)
    theirs, scale = ours.clone(), draw.choice((1.0, 0.3, 0.0))
    sketch.add(geometry, seed, ours, vector, start, scale)
    reference.add(geometry, seed, theirs, vector, start, scale)
    assert same(ours, theirs)
    k = draw.choice((1, dim, draw.randint(1, dim)))
    indices, estimates = sketch.top_k(geometry, seed, ours, k)
    everything = sketch.estimate_all(geometry, seed, ours)
    if not ours.isnan().any():
        assert same(everything, reference.estimate(geometry, seed, ours, torch.arange(dim)))
        if not everything.isnan().any():  # of infinities with opposite signs
            expected = torch.sort(everything.abs(), descending=True, stable=True).indices[:k].sort().values
            assert torch.equal(indices, expected)
            assert same(estimates, everything[expected])


def attack_advance(draw: random.Random) -> None:
    """Changing a vector on its way into the table."""
    geometry, seed = Geometry(draw.choice(SIZES), draw.choice((1, 3, 5)), draw.choice(COLUMNS)), draw.getrandbits(64)
    indices = ascending(draw, draw.choice((0, 1, draw.randint(0, geometry.dim))), geometry.dim)
    kept = Chosen(indices, comb(geometry.dim, draw.choice((0, 1, geometry.dim)), draw.randrange(9), 0))
    ours, change, values = numbers(draw, geometry.dim), numbers(draw, geometry.dim), numbers(draw, kept.count)
    theirs, table = ours.clone(), torch.zeros(geometry.rows, geometry.cols)
    sketch.add_advanced(geometry, seed, table, ours, (change, 0.7), kept, values)
    theirs.add_(change, alpha=0.7)
    theirs[kept.indices] = values[: kept.indices.numel()]
    theirs[kept.comb] = values[kept.indices.numel() :]
    expected = torch.zeros_like(table)
    reference.add(geometry, seed, expected, theirs, 0, 1.0)
    assert same(ours, theirs)
    assert same(table, expected)


def attack_code(draw: random.Random) -> None:
    """Coding, and decoding bytes that may have been changed."""
    universe = draw.choice(SIZES)
    codec, vectors = SparseCodec(universe, draw.choice((1, universe, draw.randint(1, universe)))), draw.randint(1, 3)
    indices = torch.stack([ascending(draw, codec.count, universe) for _ in range(vectors)])
    given = numbers(draw, vectors * codec.count).view(vectors, -1)
    code, decoded = codec.encode(indices, given)
    expected = codec._encode(indices, given)
    assert torch.equal(code, expected[0])
    assert same(decoded, expected[1])
    found, values, known = codec.decode(code)
    assert known.all()
    assert torch.equal(found, indices)
    assert same(values, decoded)
    for _ in range(draw.choice((1, 1, 8, codec.nbytes))):
        code[draw.randrange(vectors), draw.randrange(codec.nbytes)] ^= 1 << draw.randrange(8)
    ours, theirs = codec.decode(code), codec._decode(code)
    assert torch.equal(ours[2], theirs[2])
    assert torch.equal(ours[0], theirs[0])
    assert same(ours[1][ours[2]], theirs[1][ours[2]])
    assert bool((ours[0] >= 0).all() & (ours[0] < universe).all())


def attack_shards(draw: random.Random) -> None:
    """The heaviest of each shard, and writing to shards."""
    vector = numbers(draw, draw.choice(SIZES))
    shards = draw.randint(1, min(9, vector.numel()))
    count = draw.choice((1, vector.numel() // shards))
    rows, values = heaviest_of_shards(vector, shards, count)
    expected = _reference(vector, shards, count)
    assert torch.equal(rows, expected[0])
    assert same(values, expected[1])
    ours, theirs = vector.clone(), vector.clone()
    places = Rows(shards, 0, rows)
    places.put(ours, values * 2)
    theirs[places._coordinates()] = values.flatten() * 2
    assert same(ours, theirs)


def attack_stage(draw: random.Random) -> None:
    """Copying and measuring a gradient."""
    given, factor = numbers(draw, draw.choice(SIZES)), draw.choice((1.0, 0.3))
    staged = numbers(draw, given.numel()).clone()
    vector = draw.choice((given.numel(), 2**40))
    square = native.library().stage_gradient(
        given.data_ptr(), staged.data_ptr(), given.numel(), factor, vector, torch.get_num_threads()
    )
    assert same(staged, given * factor)
    expected = float(staged.double().square().sum())
    assert math.isclose(square, expected, rel_tol=1e-12) or (math.isnan(square) and math.isnan(expected))


def attack_mixing(draw: random.Random) -> None:
    """Hadamard transforms of matrices and vectors, and back."""
    shape = draw.choice(((draw.choice(SIZES),), (draw.choice(SIDES), draw.choice(SIDES))))
    ours, inverse = numbers(draw, math.prod(shape)), draw.random() < 0.5
    mixing = Mixing(Layout.of([("w", torch.zeros(shape))], lambda name, parameter: False), "hadamard")
    theirs = ours.clone()
    mixing.unmix_all(ours) if inverse else mixing.mix(ours, 0)
    with without_kernel():
        mixing.unmix_all(theirs) if inverse else mixing.mix(theirs, 0)
    assert same(ours, theirs)


ATTACKS = (attack_sketch, attack_sketch, attack_advance, attack_code, attack_shards, attack_stage, attack_mixing)


def main(seconds: float, first: int, file: Path) -> None:
    """Case after case until the time is over."""
    end = time.monotonic() + seconds
    for number in itertools.count(first):
        if time.monotonic() > end:
            print(f"{number - first} cases, nothing found")
            return
        file.write_text(str(number))
        draw = random.Random(number)
        torch.set_num_threads(draw.choice((1, 2, 3)))
        sketch.limit_lanes(draw.choice((4, 8, 16)))
        draw.choice(ATTACKS)(draw)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
