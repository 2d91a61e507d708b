"""Mixing: orthonormal, exactly undone, in place, and block by block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.mixing import Mixing, cosines
from tests.support.simulation import heavy_tailed

KINDS = pytest.mark.parametrize("kind", ["dct", "hadamard"])
SHAPES = pytest.mark.parametrize(
    "shape", [(96,), (7,), (128, 96), (96, 1), (1, 48), (67, 64), (67, 71), (32, 3, 3, 3), (12, 0), ()]
)


def slot_of(shape: tuple[int, ...], kind: str, *, whole: bool = False) -> Mixing:
    return Mixing(Layout.of([("w", torch.zeros(shape))], lambda name, parameter: whole), kind)


def mixed(mixing: Mixing, values: Tensor) -> Tensor:
    part = values.clone().view(-1)
    mixing.mix(part, 0)
    return part.view(values.shape)


@KINDS
@SHAPES
def test_it_is_orthonormal_and_undone_to_rounding(kind: str, shape: tuple[int, ...]) -> None:
    mixing, values = slot_of(shape, kind), heavy_tailed(*shape)
    coefficients = mixed(mixing, values)
    assert float(coefficients.norm()) == pytest.approx(float(values.norm()), rel=1e-5)
    back = coefficients.clone().view(-1)
    mixing.unmix_all(back)
    assert float((back - values.view(-1)).norm()) <= 1e-6 * float(values.norm())


@KINDS
def test_all_slots_at_once_are_each_of_them(kind: str) -> None:
    """Neighbours that are alike, others, and one that is sent whole."""
    shapes = [(64, 128), (64, 128), (128,), (64,), (7,), (48, 128), (0, 3), (32, 3, 3, 3), (96, 128), (96, 128)]
    named = [(f"p{number}", torch.zeros(shape)) for number, shape in enumerate(shapes)]
    layout = Layout.of(named, lambda name, parameter: name == "p3")
    mixing, vector = Mixing(layout, kind), heavy_tailed(layout.total)
    one_by_one, together = vector.clone(), vector.clone()
    for position, slot in enumerate(layout.slots):
        mixing.mix(one_by_one[slot.offset : slot.stop], position)
    mixing.mix_all(together)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
    assert len(mixing._runs) < sum(map(len, mixing._sides))
    mixing.unmix_all(together)
    assert float((together - vector).norm()) <= 1e-6 * float(vector.norm())


@pytest.mark.parametrize("size", [1, 2, 5, 48, 64])
def test_rows_of_the_cosine_transform_are_orthonormal(size: int) -> None:
    matrix = cosines(size)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_matrix_is_mixed_on_both_sides_in_blocks() -> None:
    """Of 128 by 96, by cosines: two by two blocks of 64 by 48."""
    values = heavy_tailed(128, 96)
    coefficients = mixed(slot_of((128, 96), "dct"), values)
    down, along = cosines(64).float(), cosines(48).float()
    for row in (0, 64):
        for col in (0, 48):
            block = slice(row, row + 64), slice(col, col + 48)
            torch.testing.assert_close(coefficients[block], down @ values[block] @ along.t(), rtol=1e-4, atol=1e-4)


def test_a_constant_becomes_one_coefficient() -> None:
    for kind in ("dct", "hadamard"):
        coefficients = mixed(slot_of((64, 32), kind), torch.ones(64, 32))
        assert float(coefficients[0, 0]) == pytest.approx(math.sqrt(64 * 32))
        assert float(coefficients.abs().sum()) == pytest.approx(math.sqrt(64 * 32), rel=1e-5)


def test_a_hadamard_transform_adds_and_subtracts() -> None:
    """Of integers it is exact, in any order of additions, so on any machine."""
    values = torch.randint(-50, 50, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    ones = torch.tensor([[1.0]])
    while len(ones) < 64:
        ones = torch.cat([torch.cat([ones, ones], 1), torch.cat([ones, -ones], 1)])
    assert torch.equal(mixed(slot_of((64, 64), "hadamard"), values), ones @ values @ ones / 64)


@KINDS
def test_tensors_sent_whole_are_left_alone(kind: str) -> None:
    values = heavy_tailed(64, 64)
    assert torch.equal(mixed(slot_of((64, 64), kind, whole=True), values), values)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mixing must be 'dct', 'hadamard' or None, got 'fourier'"):
        slot_of((4, 4), "fourier")
