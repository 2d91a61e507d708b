"""Models of types and strides that not every backend sends, broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Odd(nn.Module):
    """Of bfloat16, bool, complex numbers, without dimensions, and with strides of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8).bfloat16()
        self.channels_last = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.waves = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
        self.scale = nn.Parameter(torch.randn((), dtype=torch.bfloat16))
        self.register_buffer("mask", torch.rand(64) > 0.5)


def broadcast_odd_types(hvd: Any) -> list[list[Tensor]]:
    """Collective: what this rank has after each broadcast of models that differed; rank 1's is taken over."""
    torch.manual_seed(hvd.rank())
    seen = []
    for given in (nn.Module.state_dict, nn.Module.named_parameters, nn.Module.parameters):
        model = Odd()
        hvd.broadcast_parameters(given(model), root_rank=1)
        values = model.state_dict() if given is nn.Module.state_dict else dict(model.named_parameters())
        seen.append([value.detach().clone() for value in values.values()])
    layer = nn.Linear(8, 8).bfloat16()
    for optimizer in (torch.optim.Adam(layer.parameters(), 0.1), torch.optim.LBFGS(layer.parameters())):
        if hvd.rank() == 1:
            optimizer.param_groups[0]["lr"] = 0.5
            layer(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
            optimizer.step(lambda: 1.0)  # type: ignore[no-untyped-call]
        hvd.broadcast_optimizer_state(optimizer, root_rank=1)
        entries = [value for state in optimizer.state.values() for value in state.values()]
        seen.append([torch.tensor(optimizer.param_groups[0]["lr"]), *filter(torch.is_tensor, entries)])
    return seen
