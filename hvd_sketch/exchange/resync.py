"""Parameters of rank 0 for all ranks, where processors of several kinds round their steps differently."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_sketch.exchange.rounds import Rounds


@torch.no_grad()
def take_over_parameters(rounds: Rounds, parameters: Sequence[Tensor]) -> float:
    """Collective: replace the parameters by rank 0's; one broadcast for each dtype of them.

    Returns:
        how far one of their elements was from rank 0's at most, on this rank.
    """
    drift = 0.0
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        its = [parameter for parameter in parameters if parameter.dtype == dtype]
        own = torch.cat([parameter.detach().reshape(-1) for parameter in its])
        root = own.clone()
        rounds.take_over(root, f"parameters.{str(dtype).removeprefix('torch.')}")
        drift = max(drift, float(own.sub_(root).abs_().max()) if own.numel() else 0.0)
        values = root.split([parameter.numel() for parameter in its])
        torch._foreach_copy_(its, [value.view(parameter.shape) for value, parameter in zip(values, its, strict=True)])
    return drift
