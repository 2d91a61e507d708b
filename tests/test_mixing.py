"""Mixing: orthonormal, exactly undone, in place, and block by block; the kernels to the last bit as the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import gpu, native
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.mixing import Mixing, cosines
from tests.support.simulation import heavy_tailed
from tests.support.triton import INSTALLED, INTERPRETED, on_interpreter
from tests.support.without_kernel import without_kernel

KINDS = pytest.mark.parametrize("kind", ["dct", "hadamard"])
SPECIAL = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan])
SIDES = (1, 2, 8, 48, 64, 96, 97, 328)
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
    assert kind == "dct" or torch.equal(together, one_by_one)
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


def special(count: int) -> Tensor:
    """Numbers of which a tenth are subnormal, zeros of either sign, as large as can be, or none."""
    generator = torch.Generator().manual_seed(count)
    kind = torch.randint(10 * len(SPECIAL), (count,), generator=generator)
    return torch.where(kind < len(SPECIAL), SPECIAL[kind % len(SPECIAL)], heavy_tailed(count))


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """But for which NaN it is."""
    known = ~theirs.isnan()
    assert torch.equal(ours.isnan(), ~known)
    assert torch.equal(ours[known].view(torch.int32), theirs[known].view(torch.int32))


def check_bits(shape: tuple[int, ...], device: torch.device, values: Tensor) -> None:
    """There and back, each against the reference; the values are from somewhere within their memory."""
    mixing = slot_of(shape, "hadamard")
    for change in (lambda part: mixing.mix(part, 0), mixing.unmix_all):
        ours, theirs = torch.zeros(len(values) + 9, device=device), values.clone()
        part = ours[3 : 3 + len(values)]
        part.copy_(values)
        change(part)
        with without_kernel():
            change(theirs)
        assert_same_bits(part.cpu(), theirs)
        assert not ours[:3].any()
        assert not ours[3 + len(values) :].any()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("make", [heavy_tailed, special])
def test_the_kernel_gives_the_bits_of_the_reference(make: Callable[[int], Tensor], threads: int) -> None:
    vectors = [(count,) for count in (*SIDES, 12, 4096, 4104, 8191, 140_008, 150_016)]
    matrices = [(rows, cols) for rows in SIDES for cols in SIDES]
    others = [(0,), (64, 0), (32, 3, 3, 3), (96, 97, 3, 3), (16, 4, 2, 2), (640, 328), (12, 5000), (5000, 12), ()]
    assert native.serves_floats(torch.zeros(3))
    for shape in (*vectors, *matrices, *others):
        check_bits(shape, torch.device("cpu"), make(math.prod(shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_the_reference(dtype: torch.dtype) -> None:
    values = heavy_tailed(64, 96)
    coefficients = mixed(slot_of((64, 96), "hadamard"), values.to(dtype))
    assert coefficients.dtype == dtype
    torch.testing.assert_close(
        coefficients.float(),
        mixed(slot_of((64, 96), "hadamard"), values),
        rtol=0.1,
        atol=0.3 if dtype.itemsize < 4 else 1e-5,
    )


ON_GPU = ((64, 128), (64, 1), (32, 3, 3, 3), (97, 48), (48, 97), (8208,))


@on_interpreter
def test_the_kernel_for_a_gpu_gives_the_bits_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def serves(tensor: Tensor) -> bool:
        taken.append(tensor.storage_offset() > 0)
        return taken[-1]

    monkeypatch.setattr(native, "serves_floats", lambda tensor: False)
    monkeypatch.setattr(gpu, "serves", serves)
    for shape in ON_GPU:
        check_bits(shape, torch.device("cpu"), special(math.prod(shape)))
    assert taken == [True, False] * 2 * len(ON_GPU)


@pytest.mark.skipif(INTERPRETED or not INSTALLED or not torch.cuda.is_available(), reason="needs a GPU and Triton")
def test_on_a_gpu() -> None:
    for shape in (*ON_GPU, (640, 328)):
        check_bits(shape, torch.device("cuda"), special(math.prod(shape)))


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """With the types of its arguments other than int64 and its constants."""
    from hvd_sketch import mixing_cuda

    types = {"values": "*fp32", "along_scale": "fp32", "down_scale": "fp32"}
    for along, down, inverse in ((64, 64, False), (64, 64, True), (64, 1, False), (1, 32, True)):
        yield mixing_cuda.hadamard, types, {"along": along, "down": down, "wide": 4096 // down, "inverse": inverse}
