"""Gradients that are gathered by one kernel arrive as they do one by one: interpreted, compiled, and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.exchange.staging import Staging
from hvd_sketch.layout import Layout
from tests.support.triton import (
    INSTALLED,
    INTERPRETED,
    on_interpreter,
)

SIZES = (5000, 33, 1, 20_000, 700)


def layout() -> Layout:
    named = ((f"{i:02d}", torch.empty(size)) for i, size in enumerate(SIZES))
    return Layout.of(named, lambda name, parameter: False)


def gradients(seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {at: torch.randn(size, generator=generator) ** 3 for at, size in enumerate(SIZES)}


def check(device: torch.device) -> None:
    """Of several dtypes, some missing, some not contiguous, over several steps."""
    ours, theirs = Staging(layout(), device), Staging(layout(), torch.device("cpu"))
    for step in range(4):
        given = gradients(step)
        given[1] = given[1].to(torch.bfloat16)
        given[4] = given[4].to(torch.float16) if step % 2 else given[4].repeat_interleave(2)[::2]
        if step == 2:
            del given[0], given[3]
        ours.put_many({at: gradient.to(device) for at, gradient in given.items()}, 0.3)
        for at, gradient in given.items():
            theirs.put(at, gradient.float(), 0.3, None, 0.0)
        ours.close()
        theirs.close()
        assert torch.equal(ours.vector.cpu(), theirs.vector)
        assert ours.norm() == pytest.approx(theirs.norm(), rel=1e-7)
        assert ours.norm(slice(1, 3)) == pytest.approx(theirs.norm(slice(1, 3)), rel=1e-7)


def check_measures(device: torch.device) -> None:
    """The factor and whether it is finite, by what `Exchange` makes of the norm on the host."""
    staging = Staging(layout(), device)
    for limit in (None, 1e-3, 1e6):
        for spoiled in (1.0, 0.0, math.nan, math.inf):
            given = gradients(1)
            given[3][77] = given[3][77] * spoiled
            if spoiled == 0.0:
                given = {at: gradient * 0.0 for at, gradient in given.items()}
            staging.put_many({at: gradient.to(device) for at, gradient in given.items()}, 1.0)
            staging.close()
            assert staging.gathered
            norm = staging.norm()
            clip, finite = (number.item() for number in staging.measure(limit))
            assert (finite == 0.0) == math.isfinite(norm)
            if math.isfinite(norm):
                assert clip == pytest.approx(min(1.0, limit / norm) if limit and norm else 1.0, rel=1e-6)


def test_many_without_a_gpu_are_put_one_by_one() -> None:
    check(torch.device("cpu"))


@on_interpreter
def test_the_kernel_gathers_what_is_put_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch import gpu
    from hvd_sketch.exchange import staging_cuda

    monkeypatch.setattr(staging_cuda, "_PIECE", 4096)
    monkeypatch.setattr(gpu, "serves", lambda tensor: True)
    check(torch.device("cpu"))
    check_measures(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED or not INSTALLED or not torch.cuda.is_available(), reason="needs a GPU and Triton")
def test_on_a_gpu() -> None:
    check(torch.device("cuda"))
    check_measures(torch.device("cuda"))


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    import triton.language as tl  # type: ignore[import-untyped]

    from hvd_sketch import memory_cuda
    from hvd_sketch.exchange import staging_cuda

    add = {"values": "*fp32", "gradient": "*fp32", "clip": "*fp32", "gain": "fp32"}
    yield memory_cuda.add_fused, add, {"lanes": 2048}
    numbers = {"numbers": "*fp32", "squares": "*fp64", "limit": "fp32"}
    yield staging_cuda.conclude, numbers, {"lanes": 1024}
    pointers = {"vector": "*fp32", "pointers": "*i64", "pieces": "*i64", "squares": "*fp64", "factor": "fp32"}
    for kind in (tl.float32, tl.float16, tl.bfloat16):
        yield staging_cuda.gather, pointers, {"kind": kind, "piece": 1 << 14, "lanes": 1024}
