"""Coordinates at equal distances, whose turn it is."""

from __future__ import annotations

import torch

_TURNS = 1_000_003


def comb(size: int, stride: int, step: int, seed: int) -> slice:
    """Every ``stride``-th of ``size`` coordinates, from an offset drawn by (seed, step); none for stride 0.

    The offsets of ``stride`` steps in a row, counted from a multiple of it, are a permutation, so every coordinate
    has its turn within ``2 stride - 1`` steps.
    """
    if stride == 0:
        return slice(0)
    turn, position = divmod(step, stride)
    generator = torch.Generator().manual_seed(seed * _TURNS + turn)  # it takes the lower 32 bits
    offset = int(torch.randperm(stride, generator=generator, device="cpu")[position])
    return slice(offset, size, stride)


def most_of(size: int, stride: int) -> int:
    """The most coordinates that a `comb` has."""
    return -(-size // stride) if stride else 0
