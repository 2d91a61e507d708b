"""Whether there are kernels for a GPU."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hvd_sketch import ConfigurationError, gpu


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    gpu.available.cache_clear()
    yield
    gpu.available.cache_clear()


@pytest.mark.parametrize("triton", [None, SimpleNamespace(__version__="3.2.0", __spec__="any")])
def test_without_a_triton_new_enough_the_reference_serves(
    triton: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", triton)
        patch.setattr(importlib.util, "find_spec", lambda name: getattr(triton, "__spec__", None))
        assert not gpu.available()
        assert not gpu.available()
    assert len(caplog.records) == 1
    assert "pip install" in caplog.text


def test_gpus_that_were_never_tried_are_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not gpu.available()
    assert "NVIDIA" in caplog.text


def test_a_processor_has_no_use_for_them(caplog: pytest.LogCaptureFixture) -> None:
    assert not gpu.serves(torch.zeros(3))
    assert not caplog.records


def test_the_digit_of_a_rank() -> None:
    counts = torch.tensor([[1, 0, 2, 3], [0, 0, 0, 1]])
    value, rank = gpu.find_digit(counts, torch.tensor([[5], [2]]))
    assert value.tolist() == [[2], [0]]
    assert rank.tolist() == [[2], [1]]


def test_recordings_of_two_threads_do_not_disturb_each_other() -> None:
    begun, ended, collected = threading.Event(), threading.Event(), []

    def record() -> None:
        begun.set()
        with gpu.undisturbed():
            collected.append((gc.isenabled(), ended.is_set()))

    other = threading.Thread(target=record)
    with gpu.undisturbed():
        other.start()
        assert begun.wait(10)
        other.join(0.05)
        assert not gc.isenabled()
        ended.set()
    other.join(10)
    assert collected == [(False, True)]
    assert gc.isenabled()


class Stream:
    """Stands in for a stream of a device: remembers whom it has waited for."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


def test_work_on_several_streams_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Stream(), Stream()
    order = gpu.InOrder(torch.device("cuda"))
    for stream in (one, one, other, other, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, now=stream: now)
        order.here()
    assert one.waited == [other]
    assert other.waited == [one]


def test_an_exchange_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        gpu.refuse_capture(torch.device("cpu"))
        with pytest.raises(ConfigurationError, match="after the replay") if capturing else nullcontext():
            gpu.refuse_capture(torch.device("cuda"))
