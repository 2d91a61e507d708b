"""The GPU's choice from a vector is the reference's: on Triton's interpreter, and as compiled code.

On a GPU itself it is compared in ``tests/exchange/test_device.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_sketch.sparse.heaviest import heaviest_of_shards
from tests.support.triton import compile_all, compiles, interpret, on_interpreter, starts_interpreter

pytestmark = pytest.mark.usefixtures("one_thread")


@starts_interpreter
def test_on_the_interpreter(tmp_path: Path) -> None:
    interpret(tmp_path, __file__)


@on_interpreter
@pytest.mark.parametrize(("shards", "programs"), [(1, 2048), (2, 1), (3, 2), (7, 2048), (8, 1)])
def test_the_heaviest_of_shards(shards: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.sparse import cuda

    monkeypatch.setattr(cuda, "_PROGRAMS", programs)
    monkeypatch.setattr(cuda, "_TOGETHER", 128)
    size = 701
    normal = torch.randn(3 * size, generator=torch.Generator().manual_seed(shards))[1::3]  # not contiguous
    for vector in (normal**5, normal.round(), normal * (normal > 1.5), normal * 2.0**-130, torch.zeros(size)):
        for count in (size // shards // 30 + 1, size // shards):
            ours, expected = cuda.heaviest(vector, shards, count), heaviest_of_shards(vector, shards, count)
            assert torch.equal(ours[0], expected[0])
            assert torch.equal(ours[1].view(torch.int32), expected[1].view(torch.int32))


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    from hvd_sketch.sparse import cuda_kernels

    vector = {"vector": "*fp32"}
    counted = {**vector, "limit": "*i32", "above": "*i64", "equal": "*i64"}
    for wide, shards in ((1, 1), (7, 8), (8, 8)):
        shape = {"wide": wide, "shards": shards, "rows": 2048 // shards}
        for lower in (False, True):
            digits = {**vector, "counts": "*i32", "limit": "*i64"}
            bins = 1 << (15 if lower else 16)
            yield cuda_kernels.count_digits, digits, {**shape, "lower": lower, "low_bits": 15, "bins": bins}
        yield cuda_kernels.weigh, counted, shape
        yield cuda_kernels.write, {**counted, "ties": "*i64", "chosen": "*i64", "values": "*fp32"}, shape


@compiles
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_kernels_compile_and_nothing_is_fused_or_flushed(tmp_path: Path, capability: int) -> None:
    compile_all(tmp_path, __name__, capability)
