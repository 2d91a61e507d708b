"""The heaviest coordinates of a vector, and of each shard of one."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch import gpu, native

_MOST_SHARDS_ON_GPU = 512


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
    if gpu.serves(vector) and shards <= _MOST_SHARDS_ON_GPU and vector.numel() // shards < 2**31 - 1:
        rows, values = _on_gpu().heaviest(vector, shards, count)
        return rows, values
    if vector.numel() >= 2**32 or not native.serves(vector):
        return _reference(vector, shards, count)
    rows = torch.empty(shards, count, dtype=torch.int64, device="cpu")
    values = torch.empty(shards, count, dtype=torch.float32, device="cpu")
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


def _on_gpu() -> ModuleType:
    return importlib.import_module("hvd_sketch.sparse.cuda")  # with Triton, which no other device needs


def _reference(vector: Tensor, shards: int, count: int) -> tuple[Tensor, Tensor]:
    """On any device, without waiting for it. Magnitudes are compared as the integers that their bits are."""
    missing = -vector.numel() % shards
    padded = torch.nn.functional.pad(vector, (0, missing)).view(-1, shards).t()
    magnitudes = padded.view(torch.int32) & 0x7FFFFFFF
    if missing:
        magnitudes[-missing:, -1] = -1
    least = magnitudes.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, equal = magnitudes > least, magnitudes == least
    room = count - above.sum(dim=1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1) <= room))
    # What is taken goes to its rank, everything else to a place behind them all.
    places = torch.where(taken, taken.cumsum(1) - 1, count)
    numbers = torch.arange(padded.shape[1], device=vector.device).expand_as(places)
    rows = torch.zeros(shards, count + 1, dtype=torch.int64, device=vector.device).scatter_(1, places, numbers)
    rows = rows[:, :count].contiguous()
    return rows, padded.gather(1, rows)
