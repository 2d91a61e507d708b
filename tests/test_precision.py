"""Products of full precision, and the user's setting as it was afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from hvd_sketch import precision
from hvd_sketch.precision import full_precision


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def error() -> float:
    one, other = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    return float((one @ other - (one.double() @ other.double()).float()).abs().max())


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products_round_as_float32_inside_and_as_the_user_wants_outside(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    outside = error()
    with full_precision():
        assert error() < 1e-4
    assert torch.get_float32_matmul_precision() == setting
    assert error() == outside


def test_older_versions_of_pytorch_have_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        allow_tf32 = False

    monkeypatch.setattr(torch.backends.cuda, "matmul", Old())
    torch.set_float32_matmul_precision("medium")
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"


def test_threads_that_overlap_leave_the_setting_alone() -> None:
    torch.set_float32_matmul_precision("medium")
    entered, left = threading.Event(), threading.Event()
    seen: list[float] = []

    def other() -> None:
        with full_precision():
            entered.set()
            assert left.wait(10)
            seen.append(error())

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join(10)
    assert seen[0] < 1e-4
    assert torch.get_float32_matmul_precision() == "medium"
    assert precision._inside == 0
