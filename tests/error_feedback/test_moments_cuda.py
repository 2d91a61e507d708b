"""The kernels measure, spread and lend what PyTorch's own operations do: interpreted, compiled, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import Compression, FactoredMoments, gpu
from hvd_sketch.comm import SingleProcess
from hvd_sketch.error_feedback.factored_moments import MomentsObserver
from tests.support.triton import (
    INSTALLED,
    INTERPRETED,
    on_interpreter,
)

SHAPES = {"a": (20, 300), "b": (50,), "c": (3, 7, 11), "d": (300, 2)}


def lent(device: torch.device, dtype: torch.dtype, *, by_kernels: bool) -> list[Tensor]:
    """Adam's running means of all parameters, after steps with some of them missing."""
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(shape).to(device, dtype)) for name, shape in SHAPES.items()}
    adam = torch.optim.Adam(named.values(), lr=1e-3)
    compressor = Compression.topk(ratio=4.0, warmup_steps=0, dense_below=0)
    exchange = compressor.exchange(compressor.layout(named.items()), SingleProcess(), average=True, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "serves", lambda tensor: by_kernels)
        observer = MomentsObserver(FactoredMoments(interval=2), named.items())
        observer.attach(exchange)
    seen = []
    for step in range(4):
        exchange.submit_all(
            torch.randn(exchange.layout.total, generator=torch.Generator().manual_seed(step)).to(device)
        )
        exchange.run()
        for position, slot in enumerate(exchange.layout.slots):
            if (step, slot.name) != (0, "c"):
                named[slot.name].grad = exchange.update_of(position).to(dtype).clone()
        observer.lend(adam)
        seen += [adam.state[p]["exp_avg_sq"].float().cpu().clone() for p in named.values() if adam.state.get(p)]
        adam.step()
    return seen


def check(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ours, expected = (lent(device, dtype, by_kernels=by_kernels) for by_kernels in (True, False))
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


@on_interpreter
def test_the_kernels_lend_what_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.error_feedback import moments_cuda

    monkeypatch.setattr(moments_cuda, "_PIECE", 1024)
    check(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED or not INSTALLED or not torch.cuda.is_available(), reason="needs a GPU and Triton")
def test_on_a_gpu() -> None:
    check(torch.device("cuda"))


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    import triton.language as tl  # type: ignore[import-untyped]

    from hvd_sketch.error_feedback import moments_cuda

    pointers = dict.fromkeys(("matrices", "table", "pieces", "means", "updates"), "*i64")
    pointers |= dict.fromkeys(("factors", "vector", "scales", "energies", "numbers"), "*fp32") | {"scale": "fp32"}
    for kernel in (moments_cuda.sum_rows, moments_cuda.sum_columns):
        yield kernel, pointers, {"rows": 8, "columns": 128}
    yield moments_cuda.scale_of, pointers, {"lanes": 1024}
    yield moments_cuda.spread, pointers, {"piece": 1 << 14, "lanes": 1024}
    yield moments_cuda.lend, pointers, {"kind": tl.bfloat16, "piece": 1 << 14, "lanes": 1024}
