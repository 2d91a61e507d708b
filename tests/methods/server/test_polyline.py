"""The polyline code: known answers of the public format, its error bound, and what it makes of anything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_sketch.methods.server.polyline import Polyline


def encode(values: list[float], precision: int) -> str:
    return bytes(Polyline(precision).encode(np.array(values, float))).decode()


def decode(text: str, precision: int) -> list[float]:
    decoded: list[float] = Polyline(precision).decode(np.frombuffer(text.encode(), np.uint8)).tolist()
    return decoded


@pytest.mark.parametrize(
    ("values", "precision", "text"),
    [
        ([-179.9832104], 5, "`~oia@"),
        ([38.5, 40.7, 43.252], 5, "_p~iF_ulL_mqN"),
        ([-120.2, -120.95, -126.453], 5, "~ps|UnnqCvxq`@"),
        ([0.1234, -0.0567, 0.0, 0.00004, -1.5, 2.25], 4, "clApoBmb@?nh\\wfhA"),
        ([], 4, ""),
        ([0.0, 0.0, 0.0], 4, "???"),
    ],
)
def test_known_answers_of_the_public_format(values: list[float], precision: int, text: str) -> None:
    assert encode(values, precision) == text
    assert decode(text, precision) == pytest.approx(values, abs=0.5 * 10.0**-precision)


def test_a_known_answer_is_decoded_to_its_rounded_values() -> None:
    assert decode("clApoBmb@?nh\\wfhA", 4) == [0.1234, -0.0567, 0.0, 0.0, -1.5, 2.25]


def test_halves_are_rounded_to_even() -> None:
    assert decode(encode([0.5, 1.5, 2.5, -0.5, -1.5], 0), 0) == [0.0, 2.0, 2.0, 0.0, -2.0]


@given(st.lists(st.floats(-1e5, 1e5), max_size=50), st.integers(0, 9))
def test_the_error_is_half_a_digit_and_does_not_add_up(values: list[float], precision: int) -> None:
    for before, after in zip(values, decode(encode(values, precision), precision), strict=True):
        assert abs(before - after) <= 0.5 * 10.0**-precision + 1e-10


@given(st.lists(st.integers(-(2**62) + 2**10, 2**62 - 2**10), min_size=1, max_size=20))
def test_the_largest_numbers_fit(values: list[int]) -> None:
    exact = [float(value) for value in values]
    assert decode(encode(exact, 0), 0) == exact


@given(st.binary(max_size=30))
def test_what_is_decoded_is_encoded_to_the_same_text_or_was_refused(content: bytes) -> None:
    polyline = Polyline(0)
    try:
        values = polyline.decode(np.frombuffer(content, np.uint8))
    except ValueError:
        return
    assert np.isfinite(values).all()
    assert polyline.decode(polyline.encode(values[np.abs(values) < 2.0**53])).tolist() == [
        value for value in values if abs(value) < 2.0**53
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**62])
def test_what_has_no_code_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite and below"):
        encode([0.0, value], 0)


@pytest.mark.parametrize("text", ["_", " ", "\x7f", "~" * 13 + "?", "~" * 12 + "P"])
def test_what_no_number_is_written_like_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="polyline"):
        decode(text, 4)


@pytest.mark.parametrize(("deviation", "ratios"), [(0.01, (3.2, 2.1, 1.5, 1.25)), (0.05, (2.2, 1.6, 1.35, 1.05))])
def test_how_many_times_shorter_than_float32_it_is(deviation: float, ratios: tuple[float, ...]) -> None:
    values = np.random.default_rng(0).normal(0.0, deviation, 100_000)
    for precision, ratio in zip((3, 4, 5, 6), ratios, strict=True):
        assert 4 * len(values) / len(Polyline(precision).encode(values)) == pytest.approx(ratio, rel=0.03)
