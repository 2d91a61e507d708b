"""Shards of a vector: what is written where, by the kernel as by the reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.sparse.rows import Rows, add
from tests.support.pieces import check_pieces
from tests.support.without_kernel import without_kernel


def draw(size: int, shards: int, lists: int, data: st.DataObject) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    least = size // shards
    count = data.draw(st.integers(1, least))
    rows = [torch.randperm(least, generator=generator)[:count].sort().values for _ in range(lists)]
    return torch.randn(size, generator=generator), torch.stack(rows), torch.randn(lists, count, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.data())
def test_rows_are_entries_at_a_distance_of_the_number_of_shards(shards: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, shards - 1))
    lists = data.draw(st.integers(0, shards - first))
    vector, rows, values = draw(data.draw(st.integers(shards, 100_000)), shards, max(1, lists), data)
    rows, values = rows[:lists], values[:lists]
    expected, reference, ours = vector.clone(), vector.clone(), vector.clone()
    for shard, (chosen, new) in enumerate(zip(rows, values, strict=True), start=first):
        expected[shard::shards][chosen] = new
    Rows(shards, first, rows).put(ours, values)
    with without_kernel():
        Rows(shards, first, rows).put(reference, values)
    assert torch.equal(ours, expected)
    assert torch.equal(reference, expected)
    Rows(shards, first, rows).put(ours, 0.0)
    assert torch.equal(ours == vector, (expected == vector) | (vector == 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.booleans(), st.lists(st.integers(0, 60_000), max_size=9), st.data())
def test_pieces_of_a_vector_get_their_part(shards: int, clear: bool, edges: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(shards, 60_000))
    before, rows, values = draw(size, shards, shards, data)
    check_pieces(Rows(shards, 0, rows), before, values, clear=clear, edges=edges)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.data())
def test_lists_are_added_one_after_the_other(shards: int, lists: int, data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    vector, rows, values = draw(data.draw(st.integers(shards, 100_000)), shards, lists, data)
    expected, ours = vector.clone(), vector.clone()
    add(ours, shards, shard, rows, values)
    with without_kernel():
        add(expected, shards, shard, rows, values)
    assert torch.equal(ours, expected)
    others = torch.ones_like(vector, dtype=torch.bool)
    others[shard::shards] = False
    assert torch.equal(ours[others], vector[others])
