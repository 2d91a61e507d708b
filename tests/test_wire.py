"""Lanes of a message: what the header tells in sum, and checksums that tell ranks apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch import wire

NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=40)


def agree(*contents: Tensor) -> bool:
    lanes = torch.zeros(len(contents), wire.DIGEST_BITS, dtype=torch.float16)
    for own, content in zip(lanes, contents, strict=True):
        wire.write_digest(own, content)
    return wire.digests_agree(lanes.sum(0).tolist(), float(len(contents)))


@given(NUMBERS, st.data())
def test_a_digest_tells_one_changed_entry_and_an_exchange_of_two(numbers: list[int], data: st.DataObject) -> None:
    mine = torch.tensor(numbers)
    assert agree(mine, mine.clone(), mine.clone())
    place = data.draw(st.integers(0, len(numbers) - 1))
    changed = mine.clone()
    changed[place] ^= data.draw(st.integers(1, 2**40))
    assert not agree(mine, changed)
    swapped = mine.roll(1)
    assert agree(mine, mine, swapped) == torch.equal(mine, swapped)


def test_a_digest_of_floats_is_of_their_bits() -> None:
    values = torch.tensor([0.0, 1.0, float("nan")])
    assert agree(values, values.clone())
    assert not agree(values, torch.tensor([-0.0, 1.0, float("nan")]))
    assert not agree(torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("finite", "incomplete", "problem", "flush"),
    [(True, False, False, False), (False, False, True, False), (True, True, True, True), (True, True, False, False)],
)
def test_a_header_tells_in_sum_what_one_rank_says(
    rank: int, finite: bool, incomplete: bool, problem: bool, flush: bool
) -> None:
    messages = torch.zeros(3, wire.HEADER + 2, dtype=torch.float16)
    for number, message in enumerate(messages):
        mine = number == rank
        told = {"incomplete": incomplete and mine, "problem": problem and mine, "flush": flush and mine}
        wire.write_header(message, finite or not mine, **told)
        wire.write_digest(message[wire.DIGEST], torch.tensor([7]))
    header = wire.read_header(messages.sum(0))
    assert header == (finite, incomplete, 3.0, problem, flush, True)
    assert header.void == (not finite or problem or flush)
    for ranks in (1, 3, 8, 200):
        bits = torch.stack([wire.pack_header(message, ranks) for message in messages])
        assert wire.read_packed_headers(bits, ranks) == header
    pairs = torch.stack([messages[:2].float().mean(0), messages[2].float() / 2])
    means = torch.stack([wire.pack_header(pair, 2) for pair in pairs])
    assert wire.read_packed_headers(means, 2) == wire.read_header(pairs.sum(0))
    for place in range(0, wire.HEADER, 5):
        bits = torch.stack([wire.pack_header(message) for message in messages])
        bits[rank, place % len(bits[rank])] ^= 1 << place // len(bits[rank])
        assert wire.read_packed_headers(bits) == header


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@given(size=st.integers(1, 200), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_what_a_tensor_is_folded_to_tells_any_changed_bit(
    dtype: torch.dtype, size: int, place: float, bit: int
) -> None:
    content = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    changed = content.clone()
    changed.view(torch.uint8)[int(place * changed.nbytes)] ^= 1 << bit
    assert torch.equal(wire.fold(content), wire.fold(content.clone()))
    assert not torch.equal(wire.fold(content), wire.fold(changed))
