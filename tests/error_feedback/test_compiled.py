"""A compiled model is compiled once, and steps ahead as it does uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from hvd_sketch import Anticipate, Compression, DistributedOptimizer
from hvd_sketch.comm import SingleProcess

Compile = Callable[[nn.Module], Any]


def losses(compile_it: Compile, in_block: bool) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
    compiled, inputs = compile_it(model), torch.randn(16, 20)
    optimizer: Any = DistributedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        model.named_parameters(),
        Compression.sharded(ratio=4.0, warmup_steps=0),
        comm=SingleProcess(),
        error_feedback=Anticipate(),
    )
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        with optimizer.step_ahead() if in_block else nullcontext():
            loss = nn.functional.mse_loss(compiled(inputs), inputs[:, :3])
            loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("in_block", [False, True])
def test_a_compiled_model_is_compiled_once(in_block: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    assert losses(lambda model: torch.compile(model, backend=counter), in_block) == losses(
        lambda model: model, in_block
    )
    assert counter.frame_count == 1
