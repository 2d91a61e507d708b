"""The GPU's code has the bytes of the reference's: on Triton's interpreter, and as compiled code.

On a GPU itself it is compared in ``tests/exchange/test_device.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.sparse.codec import SparseCodec
from tests.support.triton import on_interpreter


def lists(codec: SparseCodec, vectors: int, kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(codec.count)
    least = min(codec.universe, 10_000)
    chosen = [torch.randperm(least, generator=generator)[: codec.count].sort().values for _ in range(vectors)]
    values = torch.randn(vectors, codec.count, generator=generator) ** 3
    if kind == "zeros":
        values[:, ::3] = torch.tensor([0.0, -0.0]).repeat(codec.count)[: values[0, ::3].numel()]
    if kind in ("inf", "nan"):
        values[:, ::7] = float(kind)
        values[:, 3::7] = -float(kind)
    if kind == "largest":
        values = torch.tensor([3.4e38, *[-1.0] * (codec.count - 1)]).expand(vectors, -1).contiguous()
    scale = {"subnormal": 2.0**-132, "huge": 1e30, "nothing": 0.0}
    return torch.stack(chosen) * (codec.universe // least), values * scale.get(kind, 1.0)


@on_interpreter
@pytest.mark.parametrize(
    ("universe", "count", "kind"),
    [
        (1, 1, "any"),
        (9, 9, "any"),
        (1000, 3, "zeros"),
        (5000, 130, "any"),
        (2**33, 20, "any"),
        *((5000, 40, kind) for kind in ("zeros", "subnormal", "huge", "nothing", "largest", "inf", "nan")),
    ],
)
def test_the_bytes_of_the_reference(universe: int, count: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.sparse import codec_cuda

    monkeypatch.setattr(codec_cuda, "_BLOCK", 16)
    monkeypatch.setattr(codec_cuda, "_LOG", 4)
    codec = SparseCodec(universe, count)
    indices, values = lists(codec, 2, kind)
    code, decoded = codec_cuda.encode(codec, indices, values)
    expected = codec.encode(indices, values)
    assert torch.equal(code, expected[0])
    assert torch.equal(decoded.view(torch.int32), expected[1].view(torch.int32))
    back = codec_cuda.decode(codec, code)
    assert torch.equal(back[0], indices)
    assert torch.equal(back[1].view(torch.int32), expected[1].view(torch.int32))


@on_interpreter
def test_what_is_no_code_is_not_a_number_at_indices_that_there_are() -> None:
    from hvd_sketch.sparse import codec_cuda

    codec = SparseCodec(1000, 37)
    code, _ = codec.encode(*lists(codec, 2, "any"))
    damages = [code.clone() for _ in range(4)]
    damages[0][1, -10:] = 255  # too many indices
    damages[1][1, -10:] = 0  # too few
    larger, _ = SparseCodec(1500, 37).encode(torch.arange(1463, 1500).unsqueeze(0), torch.ones(1, 37))
    damages[2][1] = larger[0, : codec.nbytes]
    damages[3][1, -1] ^= 1  # a bit behind the last
    for damaged in damages:
        indices, values = codec_cuda.decode(codec, damaged)
        assert bool(((indices >= 0) & (indices < 1000)).all())
        assert bool(values[1].isnan().any())
        assert bool(values[0].isfinite().all())


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    import triton.language as tl  # type: ignore[import-untyped]

    from hvd_sketch.sparse import codec_cuda

    pointers = {"code": "*u8", "ends": "*i32", "numbers": "*i32", "fewer": "*i32", "words": "*i32"}
    pointers |= dict.fromkeys(("values", "decoded", "sums", "less", "means"), "*fp32")
    pointers |= dict.fromkeys(("indices", "ones", "until"), "*i64")
    yield codec_cuda.find_ends, pointers, {"lanes": 1024}
    yield codec_cuda.weigh, pointers, {"log": 10}
    yield codec_cuda.add_up, pointers, {"log": 10}
    yield codec_cuda.average, pointers, {"log": 10}
    yield codec_cuda.count_ones, pointers, {"lanes": 1024}
    for low_bits in (0, 7):
        yield codec_cuda.pack, pointers, {"low_bits": low_bits, "groups": 128}
        for whole in (tl.int32, tl.int64):
            yield codec_cuda.unpack, pointers, {"low_bits": low_bits, "whole": whole, "lanes": 1024}
