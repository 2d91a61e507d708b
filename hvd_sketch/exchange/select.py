"""The heaviest coordinates of a vector."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE = 1 << 14
_MARGIN = 1.2


def heaviest(vector: Tensor, count: int) -> Tensor:
    """Indices (int64, ascending) of the ``count`` entries of largest magnitude; of equal ones any.

    A sample gives a threshold that a few more entries than wanted exceed; those alone are ranked.
    Should it be too high, all are.
    """
    magnitudes = vector.abs()
    stride = magnitudes.numel() // _SAMPLE
    if stride > 1:
        sample = magnitudes[::stride]
        rank = int(_MARGIN * count / stride) + 32
        if 2 * rank < sample.numel():
            threshold = sample.topk(rank, sorted=False).values.min()
            candidates = (magnitudes >= threshold if threshold > 0 else magnitudes).nonzero().squeeze(1)
            missing = count - candidates.numel()
            if missing > 0 and threshold == 0:  # everything that is not zero, and some zeros
                zeros = (magnitudes == 0).nonzero().squeeze(1)[:missing]
                return torch.cat([candidates, zeros]).sort().values
            if missing <= 0:
                ranked = magnitudes[candidates].topk(count, sorted=False).indices
                return candidates[ranked.sort().values]
    return magnitudes.topk(count, sorted=False).indices.sort().values
