"""Gradients on their way into one vector: what arrives is what was handed in, and so is its norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_sketch.exchange.staging import Staging
from hvd_sketch.layout import Layout
from tests.support.without_kernel import without_kernel

CPU = torch.device("cpu")


def layout(*sizes: int) -> Layout:
    return Layout.of(((f"{i:02d}", torch.empty(size)) for i, size in enumerate(sizes)), lambda name, parameter: False)


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** 3


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=4), st.sampled_from([1.0, 0.37]), st.integers(0, 99))
def test_the_kernel_copies_and_measures_as_the_reference_does(sizes: list[int], factor: float, seed: int) -> None:
    gradients = [numbers(size, seed + i) for i, size in enumerate(sizes)]

    def stage(threads: int) -> tuple[torch.Tensor, float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        staging = Staging(layout(*sizes), CPU)
        for position in reversed(range(len(sizes))):
            staging.put(position, gradients[position], factor, None, 0.0)
        torch.set_num_threads(before)
        return staging.vector, staging.norm()

    with without_kernel():
        vector, norm = stage(1)
    assert torch.equal(vector, torch.cat(gradients) * factor)
    assert norm == pytest.approx(float(vector.double().norm()), rel=1e-7)
    for threads in (1, 2):
        ours = stage(threads)
        assert torch.equal(ours[0], vector)
        assert ours[1] == norm


def test_large_gradients_arrive_wherever_they_lie() -> None:
    """They are written past the caches, in pieces that begin where memory allows it."""
    for before in (1, 4):
        gradients = [numbers(before), numbers((1 << 23) + 5), numbers(5002, seed=1)]
        staging = Staging(layout(*(len(gradient) for gradient in gradients)), CPU)
        for position, gradient in enumerate(gradients):
            staging.put(position, gradient, 0.5, None, 0.0)
        assert torch.equal(staging.vector, torch.cat(gradients) * 0.5)
        assert staging.norm() == pytest.approx(float(staging.vector.double().norm()), rel=1e-7)


def test_a_part_has_a_norm_of_its_own() -> None:
    staging = Staging(layout(3, 4, 5), CPU)
    for position, size in enumerate((3, 4, 5)):
        staging.put(position, torch.full((size,), position + 1.0), 1.0, None, 0.0)
    assert staging.norm(slice(0, 2)) == pytest.approx(math.sqrt(3 + 16))
    assert staging.norm(slice(2, 3)) == pytest.approx(math.sqrt(45))
    assert staging.norm(slice(1, 1)) == 0.0


def test_what_does_not_arrive_is_zero() -> None:
    staging = Staging(layout(2, 3), CPU)
    staging.put_all(torch.ones(5))
    assert staging.norm() == pytest.approx(math.sqrt(5))
    staging.close()
    staging.put(1, torch.ones(3), 1.0, None, 0.0)
    assert staging.complete(slice(1, 2))
    assert not staging.complete(slice(0, 2))
    staging.close()
    assert staging.vector.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert staging.norm() == pytest.approx(math.sqrt(3))
    assert not staging.complete(slice(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_and_strides(dtype: torch.dtype) -> None:
    gradient = numbers(24).to(dtype).view(4, 6).t()
    staging = Staging(Layout.of([("w", gradient)], lambda name, parameter: False), CPU)
    staging.put(0, gradient, 0.5, torch.ones(6, 4), 0.25)
    expected = gradient.float() * 0.5 + 0.25
    assert torch.equal(staging.vector.view(6, 4), expected)
    assert staging.norm() == pytest.approx(float(expected.norm()))


def test_the_norm_of_finite_numbers_may_be_more_than_float32_holds() -> None:
    staging = Staging(layout(40), CPU)
    gradient = numbers(40)
    gradient[[3, 7]] = 3e38
    staging.put(0, gradient, 1.0, None, 0.0)
    assert staging.norm() == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_no_number(value: float) -> None:
    staging = Staging(layout(40), CPU)
    gradient = numbers(40)
    gradient[[3, 7]] = value
    staging.put(0, gradient, 1.0, None, 0.0)
    assert not math.isfinite(staging.norm())
