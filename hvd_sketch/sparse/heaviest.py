"""The heaviest coordinates of a vector, and of each shard of one."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch import native

_SAMPLE = 1 << 14
_MARGIN = 1.2
_GOLDEN = 0x9E3779B1
"""2^32 over the golden ratio: its multiples spread evenly (Knuth, The Art of Computer Programming, 6.4)."""


def heaviest(vector: Tensor, count: int) -> Tensor:
    """Rows (int64, ascending) of the ``count`` entries of largest magnitude; of equal ones the first."""
    return heaviest_of_shards(vector, 1, count)[0].squeeze(0)


def heaviest_of_shards(vector: Tensor, shards: int, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` entries of largest magnitude of every shard; of equal ones the first.

    Entry i belongs to shard ``i mod shards``, as its row ``i div shards``. The vector (float32) need not be
    contiguous. Returns rows (int64, ascending) and values, both ``(shards, count)``.

    Raises:
        ValueError: when the vector is not float32, or some shard has fewer entries.
    """
    if vector.dtype != torch.float32:
        raise ValueError(f"vector must be float32, got {vector.dtype}")
    if not 1 <= count <= vector.numel() // shards:
        raise ValueError(f"count must be between 1 and {vector.numel() // shards}, got {count}")
    if vector.numel() >= 2**32 or not native.serves(vector):
        rows = torch.stack([_reference(vector[shard::shards], count) for shard in range(shards)])
        return rows, torch.stack([vector[shard::shards][chosen] for shard, chosen in enumerate(rows)])
    rows = torch.empty(shards, count, dtype=torch.int64)
    values = torch.empty(shards, count, dtype=torch.float32)
    native.library().sparse_heaviest(
        vector.data_ptr(),
        vector.numel(),
        vector.stride(0),
        shards,
        count,
        rows.data_ptr(),
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return rows, values


def _reference(vector: Tensor, count: int) -> Tensor:
    """A sample gives a threshold that a few more entries than wanted exceed; those alone are ranked.

    Should it be too high, all are. Magnitudes are compared as the integers that their bits are.
    """
    magnitudes = vector.view(torch.int32) & 0x7FFFFFFF
    stride = magnitudes.numel() // _SAMPLE
    if stride > 1:
        blocks = torch.arange(_SAMPLE, device=vector.device)
        # One entry of each block, never the same one: matrices have a period.
        sample = magnitudes[blocks * stride + ((blocks * _GOLDEN & 0xFFFFFFFF) * stride >> 32)]
        rank = int(_MARGIN * count / stride) + 32
        if 2 * rank < _SAMPLE:
            candidates = (magnitudes >= sample.topk(rank, sorted=False).values.min()).nonzero().squeeze(1)
            if candidates.numel() >= count:
                return candidates[_rank(magnitudes[candidates], count)]
    return _rank(magnitudes, count)


def _rank(magnitudes: Tensor, count: int) -> Tensor:
    least = magnitudes.topk(count, sorted=False).values.min()
    above = magnitudes > least
    equal = (magnitudes == least).nonzero().squeeze(1)
    above[equal[: count - int(above.sum())]] = True
    return above.nonzero().squeeze(1)
