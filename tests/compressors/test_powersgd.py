"""PowerSGD keeps what it did not send, however the user lets matrix products round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hvd_sketch import Compression, ConfigurationError
from tests.support.simulation import heavy_tailed, lost, rounding, simulate
from tests.support.triton import on_interpreter

SHAPES = {"weight": (400, 300), "other": (64, 500)}


@pytest.fixture
def rough_products() -> Iterator[None]:
    """Where the hardware has products of bfloat16 or TF32, they serve float32 matrices."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("rough_products")
def test_nothing_is_lost_where_products_may_be_rough() -> None:
    gradients = heavy_tailed(2, 3, 152_000)
    compressor = Compression.powersgd(rank=32, start_step=0, clip_norm=None, dense_below=0)
    runs = simulate(compressor, gradients, SHAPES)
    missing = lost(gradients, runs[0].updates, [run.residual for run in runs])
    assert (missing <= 100 * rounding(gradients)).all()  # 23 times; with rough products 370 000 times


@on_interpreter
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_the_kernel_makes_bases_of_what_the_columns_span(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.compressors import powersgd_cuda

    monkeypatch.setattr(powersgd_cuda, "_LANES", 16)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(rows, columns, generator=generator) ** 3 for rows in (40, 7, 5)]
    if columns > 1:
        given[0][:, 1] = given[0][:, 0] * (1 + 1e-4 * torch.randn(40, generator=generator))  # nearly dependent
    given.append(torch.zeros(9, columns))
    places = torch.tensor([(0, 40), (40 * columns, 7), (47 * columns, 5), (52 * columns, 9)])
    flat = torch.cat([matrix.flatten() for matrix in given])
    powersgd_cuda.orthonormalize(flat, places, columns)
    for matrix, (start, rows) in zip(given, places.tolist(), strict=True):
        basis = flat[start : start + rows * columns].view(rows, columns)
        if matrix.any():
            torch.testing.assert_close(basis.T @ basis, torch.eye(columns), atol=1e-5, rtol=0.0)
            torch.testing.assert_close(basis @ (basis.T @ matrix), matrix, atol=1e-4, rtol=1e-4)
        else:
            assert not basis.any()


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    from hvd_sketch.compressors import powersgd_cuda

    for columns in (1, 4):
        yield powersgd_cuda.gram_schmidt, {"matrices": "*fp32", "places": "*i64"}, {"columns": columns, "lanes": 1024}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1, 4])
def test_in_few_bits_nothing_is_lost_and_less_is_sent(bits: int, size: int) -> None:
    gradients, plain = heavy_tailed(size, 12, 5470), Compression.powersgd(rank=3, start_step=0, clip_norm=None)
    shapes = {"bias": (70,), "one": (40, 60), "two": (30, 100)}
    runs, whole = simulate(replace(plain, factor_bits=bits), gradients, shapes), simulate(plain, gradients, shapes)
    assert all(torch.equal(run.updates, runs[0].updates) for run in runs)
    missing = lost(gradients, runs[0].updates, [run.residual for run in runs])
    assert (missing <= 10 * rounding(gradients)).all()
    if size > 1:
        assert runs[0].exchange.stats.bytes_sent < whole[0].exchange.stats.bytes_sent / 2


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="factor_bits must be 4, 8 or 32, got 5"):
        Compression.powersgd(factor_bits=5)
