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
    assert header == (finite, incomplete, 3, problem, flush, True)
    assert header.void == (not finite or problem or flush)
    for largest in (1, 3, 8, 200):
        bits = torch.stack([wire.pack_header(message, largest) for message in messages])
        assert wire.read_packed_headers(bits, largest) == header
    sums = torch.stack([wire.pack_header(messages[:2].sum(0), 2), wire.pack_header(messages[2], 2)])
    assert wire.read_packed_headers(sums, 2) == header
    for place in range(0, wire.HEADER, 5):
        bits = torch.stack([wire.pack_header(message) for message in messages])
        bits[rank, place % len(bits[rank])] ^= 1 << place // len(bits[rank])
        assert wire.read_packed_headers(bits) == header
