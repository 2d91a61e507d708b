"""The narrow sketches of all parameters at once: each is a Count Sketch of its own, the same on every device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import gpu
from hvd_sketch.sketch import CountSketch, narrow
from hvd_sketch.sketch.narrow import CELLS, NarrowSketches
from tests.support.triton import (
    INSTALLED,
    INTERPRETED,
    on_interpreter,
)

STRETCHES = [(0, 1), (1, 33), (33, 33), (33, 1000), (1000, 2111), (2500, 2900)]


def vector(seed: int = 0) -> Tensor:
    return torch.randn(3000, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("seed", [0, 5, -(2**40), 2**63])
def test_each_is_a_count_sketch(seed: int) -> None:
    tables = NarrowSketches(STRETCHES, torch.device("cpu"))(vector(), seed, 0.3)
    for (start, stop), table in zip(STRETCHES, tables, strict=True):
        sketch = CountSketch(max(1, stop - start), 1, CELLS, seed)
        sketch.add(vector()[start:stop], scale=0.3)
        assert torch.equal(table, sketch.table[0])


def test_slices_are_added_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "SLICE", 256)
    tables = NarrowSketches(STRETCHES, torch.device("cpu"))(vector(), 3)
    start, stop = STRETCHES[4]
    expected = torch.zeros(CELLS)
    for offset in range(0, stop - start, 256):
        sketch = CountSketch(stop - start, 1, CELLS, 3)
        sketch.add(vector()[start + offset : min(stop, start + offset + 256)], offset)
        expected += sketch.table[0]
    assert torch.equal(tables[4], expected)


def test_the_tables_of_a_sum_tell_its_norm() -> None:
    sketches = NarrowSketches([(0, 3000)], torch.device("cpu"))
    one, two = vector(1), vector(2)
    energies = [(sketches(one, seed) + sketches(two, seed)).square().sum().item() for seed in range(300)]
    assert sum(energies) / 300 == pytest.approx((one + two).square().sum().item(), rel=0.05)


def check(device: torch.device) -> None:
    ours = NarrowSketches(STRETCHES, device)._kernels.tables(vector().to(device), -5, 0.3)
    expected = NarrowSketches(STRETCHES, torch.device("cpu"))(vector(), -5, 0.3)
    assert torch.equal(ours.cpu().view(torch.int32), expected.view(torch.int32))


def check_energies(device: torch.device) -> None:
    sketches, values = NarrowSketches(STRETCHES, device), vector()
    for owned in (slice(0), slice(1, 2800, 3), slice(0, 3000, 1), slice(2, 40, 7)):
        tables, energies = sketches.measure(values.to(device), 4, owned)
        assert torch.equal(tables.cpu(), NarrowSketches(STRETCHES, torch.device("cpu"))(values, 4))
        counted = values.double()
        if owned.stop:
            counted[owned] /= owned.step
        expected = [float(counted[start:stop].square().sum()) for start, stop in STRETCHES]
        assert energies.tolist() == pytest.approx(expected, rel=1e-4)


def test_energies_are_those_of_the_stretches() -> None:
    check_energies(torch.device("cpu"))


@on_interpreter
@pytest.mark.parametrize("size", [256, 1 << 15])
def test_the_kernels_have_the_bits_of_the_reference(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "SLICE", size)
    check(torch.device("cpu"))
    tables = NarrowSketches(STRETCHES, torch.device("cpu"))(vector(), 4)
    monkeypatch.setattr(gpu, "serves", lambda tensor: True)
    assert torch.equal(NarrowSketches(STRETCHES, torch.device("cpu")).measure(vector(), 4, slice(0))[0], tables)


@on_interpreter
def test_the_kernels_have_the_energies_of_the_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: NarrowSketches, values: Tensor, seed: int, owned: slice) -> tuple[Tensor, Tensor]:
        tables, energies = self._kernels.measure(values, seed, owned)
        return tables, energies

    monkeypatch.setattr(NarrowSketches, "measure", measure)
    check_energies(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED or not INSTALLED or not torch.cuda.is_available(), reason="needs a GPU and Triton")
def test_on_a_gpu() -> None:
    check(torch.device("cuda"))
    check_energies(torch.device("cuda"))
    stretches = [(7, 3_000_000), (3_000_000, 3_000_001), (3_000_001, 5_000_000)]
    values = torch.randn(5_000_000) ** 3
    ours = NarrowSketches(stretches, torch.device("cuda"))(values.cuda(), 9)
    assert torch.equal(ours.cpu(), NarrowSketches(stretches, torch.device("cpu"))(values, 9))


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    from hvd_sketch.sketch import narrow_cuda

    parts = {"parts": "*fp32", "squares": "*fp32", "places": "*i64", "vector": "*fp32"}
    parts |= {"scale": "fp32", "share": "fp32"}
    for energies in (False, True):
        shape = {"size": 1 << 15, "cells": CELLS, "energies": energies}
        yield narrow_cuda.add_slices, parts, shape
    yield narrow_cuda.add_up, {"tables": "*fp32", "parts": "*fp32", "edges": "*i64"}, {"cells": CELLS}
