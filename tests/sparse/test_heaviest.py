"""Selecting by a sampled threshold gives what ranking everything gives."""

import pytest
import torch
from torch import Tensor

from hvd_sketch.sparse.heaviest import heaviest, heaviest_of_shards
from tests.support.without_kernel import without_kernel


def vectors(size: int) -> dict[str, Tensor]:
    normal = torch.randn(size, generator=torch.Generator().manual_seed(size))
    sorted_ = normal.sort().values
    return {
        "normal": normal,
        "heavy-tailed": normal**5,
        "ascending": sorted_,
        "all weight in a few": normal * (torch.arange(size) % 997 == 3),
        "heavy where nobody looks": normal + 100.0 * (torch.arange(size) % (size // 2**14 or 1) == 1),
        "light where everybody looks": normal * (1.0 + 99.0 * (torch.arange(size) % (size // 2**14 or 1) != 0)),
        "heavy at the end": normal * (1.0 + 99.0 * (torch.arange(size) > 0.8 * size)),
        "half precision": normal.half().float(),
    }


@pytest.mark.parametrize("size", [1, 1000, 40_000, 700_001])
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.2, 0.9, 1.0])
def test_the_heaviest_are_chosen(size: int, share: float) -> None:
    count = max(1, int(size * share))
    for name, vector in vectors(size).items():
        chosen = heaviest(vector, count)
        assert chosen.dtype == torch.int64, name
        assert chosen.numel() == count, name
        assert (chosen.diff() > 0).all(), name
        least, others = vector[chosen].abs().min(), vector.abs().index_fill(0, chosen, 0.0)
        assert others.max() <= least, name


def test_of_equal_entries_the_first_are_chosen() -> None:
    first = torch.arange(500)
    for size in (1000, 100_000):
        assert torch.equal(heaviest(torch.zeros(size), 500), first)
        assert torch.equal(heaviest(-torch.ones(size), 500), first)
        some = torch.zeros(size)
        some[7::50] = 3.0
        chosen = heaviest(some, size // 50 + 2)
        assert torch.equal(chosen, torch.cat([torch.tensor([0, 1]), torch.arange(7, size, 50)]))


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_every_shard_is_ranked_by_itself_and_by_the_kernel_as_by_the_reference(shards: int) -> None:
    for size in (shards, 1000, 300_001):
        for name, vector in vectors(size).items():
            for count in {1, max(1, size // shards // 50), size // shards}:
                compare(vector, shards, count, name)
                compare(vector.repeat_interleave(3)[1::3], shards, count, name)


def compare(vector: Tensor, shards: int, count: int, name: str) -> None:
    rows, values = heaviest_of_shards(vector, shards, count)
    for shard in range(shards):
        assert torch.equal(rows[shard], heaviest(vector[shard::shards], count)), name
        assert torch.equal(values[shard], vector[shard::shards][rows[shard]]), name
    with without_kernel():
        expected = heaviest_of_shards(vector, shards, count)
    assert torch.equal(rows, expected[0]), name
    assert torch.equal(values, expected[1]), name


def test_any_number_of_threads_chooses_the_same() -> None:
    vector = torch.randn(1_000_003)
    expected = heaviest_of_shards(vector, 4, 20_000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 5):
            torch.set_num_threads(threads)
            rows, values = heaviest_of_shards(vector, 4, 20_000)
            assert torch.equal(rows, expected[0])
            assert torch.equal(values, expected[1])
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 3, got 4"):
        heaviest_of_shards(torch.zeros(7), 2, 4)
    with pytest.raises(ValueError, match="between 1 and 7, got 0"):
        heaviest(torch.zeros(7), 0)
    with pytest.raises(ValueError, match="must be float32, got torch.float64"):
        heaviest(torch.zeros(7, dtype=torch.float64), 1)
