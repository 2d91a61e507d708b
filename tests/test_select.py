"""Selecting by a sampled threshold gives what ranking everything gives."""

import pytest
import torch
from torch import Tensor

from hvd_sketch.exchange.select import heaviest


def vectors(size: int) -> dict[str, Tensor]:
    normal = torch.randn(size, generator=torch.Generator().manual_seed(size))
    sorted_ = normal.sort().values
    return {
        "normal": normal,
        "heavy-tailed": normal**5,
        "ascending": sorted_,
        "all weight in a few": normal * (torch.arange(size) % 997 == 3),
        "heavy where nobody looks": normal + 100.0 * (torch.arange(size) % (size // 2**14 or 1) == 1),
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


def test_equal_and_zero_entries() -> None:
    assert heaviest(torch.zeros(100_000), 500).unique().numel() == 500
    assert heaviest(torch.ones(100_000), 500).unique().numel() == 500
