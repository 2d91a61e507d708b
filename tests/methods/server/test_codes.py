"""One table of all codes, and the laws that each of them keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.compressors import Sparsifier
from hvd_sketch.compressors.tensor_topk import TensorTopK
from hvd_sketch.layout import Layout
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.polyline import Polyline, PolylineCode
from hvd_sketch.methods.server.sparse_codes import sparse_code
from hvd_sketch.schedules.accordion import Accordion
from tests.support.simulation import heavy_tailed

SHAPES = {"bias": (40,), "weight": (50, 60)}
TOTAL = 3040
RATIO = 10.0


def layout_of(compression: Sparsifier) -> Layout:
    return compression.layout((name, torch.zeros(shape)) for name, shape in SHAPES.items())


def sparse(compression: Sparsifier) -> Code:
    return sparse_code(compression, layout_of(compression))


@dataclass
class Case:
    """A code, and the largest error of what is read of a vector plus what is left of it."""

    make: Callable[[], Code]
    error: float = 0.0


SETTINGS: dict[str, Any] = {"ratio": RATIO, "warmup_steps": 0}
CASES = {
    "whole": Case(lambda: Whole(TOTAL, torch.float32)),
    "topk": Case(lambda: sparse(Compression.topk(**SETTINGS))),
    "topk, nothing dense": Case(lambda: sparse(Compression.topk(**SETTINGS, dense_below=0))),
    "sharded": Case(lambda: sparse(Compression.sharded(**SETTINGS)), 2.0**-20),
    "sharded, some dense": Case(lambda: sparse(Compression.sharded(**SETTINGS, dense_below=100)), 2.0**-20),
    "auto": Case(lambda: sparse(Compression.auto(**SETTINGS)), 2.0**-20),
    "stride": Case(lambda: sparse(Compression.stride(**SETTINGS))),
    "warm-up": Case(lambda: sparse(Compression.topk(ratio=RATIO, warmup_steps=100))),
    "polyline": Case(lambda: PolylineCode(Polyline(4), TOTAL), 2.0**-20),
}
STEPS = range(3)


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_and_what_is_left_make_the_vector(name: str) -> None:
    case = CASES[name]
    code = case.make()
    for step in STEPS:
        vector = heavy_tailed(TOTAL, seed=step)
        left, read = vector.clone(), torch.zeros(TOTAL)
        payload = code.encode(left, step)
        code.add(payload, read)
        assert payload.dtype == torch.uint8
        assert payload.numel() <= code.most_bytes
        torch.testing.assert_close(read + left, vector, rtol=case.error, atol=case.error)
        assert torch.linalg.vector_norm(left) < torch.linalg.vector_norm(vector)


@pytest.mark.parametrize("name", CASES)
def test_two_readers_add_the_same_floats(name: str) -> None:
    """So the server's copy of what a worker holds is what the worker holds, to the bit."""
    code = CASES[name].make()
    here = there = heavy_tailed(TOTAL, seed=9)
    there = there.clone()
    for step in STEPS:
        payload = code.encode(heavy_tailed(TOTAL, seed=step), step)
        code.add(payload, here)
        code.add(payload.clone(), there)
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("whole", "warm-up")])
def test_everything_gets_through_in_time(name: str) -> None:
    """Differences to what the other side has shrink to rounding, however little a message holds."""
    code = CASES[name].make()
    vector, shown = heavy_tailed(TOTAL), torch.zeros(TOTAL)
    for step in range(100):
        code.add(code.encode(vector - shown, step), shown)
    assert torch.linalg.vector_norm(vector - shown, torch.inf) < 1e-3 * torch.linalg.vector_norm(vector, torch.inf)


@pytest.mark.parametrize("name", ["topk", "topk, nothing dense", "sharded", "auto", "stride"])
def test_a_message_has_the_bytes_of_its_ratio(name: str) -> None:
    size = CASES[name].make().encode(heavy_tailed(TOTAL), 0).numel()
    assert 0.8 * 4 * TOTAL / RATIO <= size <= 4 * TOTAL / RATIO + 4


def test_a_warm_up_begins_with_everything() -> None:
    vector = heavy_tailed(TOTAL)
    payload = CASES["warm-up"].make().encode(vector, 0)
    assert payload.numel() == 4 + 4 * TOTAL
    assert not vector.any()


@pytest.mark.parametrize("name", ["topk", "sharded", "stride", "polyline"])
def test_float64_is_sent_in_parts_and_nothing_is_lost(name: str) -> None:
    vector = heavy_tailed(TOTAL).double() / 3
    left, read = vector.clone(), torch.zeros_like(vector)
    code = CASES[name].make()
    code.add(code.encode(left, 0), read)
    torch.testing.assert_close(read + left, vector, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_shortened_and_lengthened_bytes_are_refused(name: str) -> None:
    code = CASES[name].make()
    payload = code.encode(heavy_tailed(TOTAL), 0)
    for wrong in (payload[:-1], payload[:3], payload[:0], torch.cat([payload, payload[:1]])):
        with pytest.raises(ValueError, match="."):
            code.add(wrong, torch.zeros(TOTAL))


@given(st.sampled_from(sorted(CASES)), st.data())
def test_changed_bytes_are_refused_or_stay_within_the_vector(name: str, data: st.DataObject) -> None:
    code = CASES[name].make()
    payload = code.encode(heavy_tailed(TOTAL), 0)
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(0, payload.numel() - 1))] = data.draw(st.integers(0, 255))
    around = torch.zeros(TOTAL + 200)
    with suppress(ValueError):
        code.add(payload, around[100:-100])
    assert not around[:100].any()
    assert not around[-100:].any()


def test_indices_must_ascend() -> None:
    code = CASES["topk, nothing dense"].make()
    payload = code.encode(heavy_tailed(TOTAL), 0)
    count = int(payload[:4].view(torch.int32))
    for wrong in ([5, 5], [6, 5], [-1, 5], [5, TOTAL]):
        changed: Tensor = payload.clone()
        indices = changed[4 : 4 + 4 * count].view(torch.int32)
        indices[:] = torch.arange(count) + 10
        place = slice(0, 2) if wrong[1] < TOTAL else slice(-2, None)
        indices[place] = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(ValueError, match="ascending"):
            code.add(changed, torch.zeros(TOTAL))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse(Compression.sketch(ratio=8.0)), "Sketch cannot choose from one vector alone"),
        (lambda: sparse(TensorTopK(ratio=8.0)), "TensorTopK cannot choose"),
        (lambda: sparse(Compression.topk(schedule=Accordion(2.0, 9.0, 5))), "Accordion learns from what all ranks"),
        (lambda: sparse(Compression.topk(ratio=5000.0)), "ratio=5000 cannot be reached"),
        (lambda: Polyline(13), "precision must be from 0 to 12"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
