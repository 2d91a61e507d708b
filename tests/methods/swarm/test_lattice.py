"""The lattice: error bounds, refusal outside the radius, and exactness."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.swarm.lattice import FullPrecision, Lattice, LatticeCode, OutsideRadius

BITS = (4, 8, 16)
COUNTS = (1, 7, 1000, 200_001)


def meet(bits: int, exponent: int, theirs: torch.Tensor, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What I decode of their vector, and its reported difference."""
    code = LatticeCode(bits, mine.numel(), mine.dtype)
    payload, scratch = torch.empty(code.payload_bytes, dtype=torch.uint8), torch.empty_like(mine)
    checksum = code.encode(theirs, exponent, payload, torch.empty_like(theirs))
    snapshot = torch.empty_like(mine)
    code.encode(mine, exponent, torch.empty_like(payload), snapshot)
    distance = code.difference(payload, checksum, exponent, snapshot, scratch)
    assert distance == float(scratch.abs().max())
    return scratch + snapshot * 2.0**exponent, scratch


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_at_most_half_a_step_within_the_radius(bits: int, count: int, dtype: torch.dtype) -> None:
    exponent = -12
    step, radius = 2.0**exponent, 2.0**exponent * (2 ** (bits - 1) - 1)
    mine = 3 * torch.randn(count, dtype=dtype)
    theirs = mine + radius * 0.999 * (2 * torch.rand(count, dtype=dtype) - 1)
    decoded, _ = meet(bits, exponent, theirs, mine)
    assert float((decoded - theirs).abs().max()) <= step / 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("steps_beyond", [1, 2, 17, 1_000])
@pytest.mark.parametrize("where", [0, 70_000, 99_999])
def test_one_coordinate_outside_the_radius_is_detected(bits: int, steps_beyond: int, where: int) -> None:
    mine = torch.randn(100_000)
    theirs = mine.clone()
    theirs[where] += 2.0**-10 * (2 ** (bits - 1) + steps_beyond)
    with pytest.raises(OutsideRadius, match="differ by more than"):
        meet(bits, -10, theirs, mine)


@pytest.mark.parametrize("bits", BITS)
def test_wrapping_once_around_is_detected(bits: int) -> None:
    mine = torch.zeros(100)
    with pytest.raises(OutsideRadius):
        meet(bits, 0, torch.full((100,), 2.0**bits), mine)


@pytest.mark.parametrize("bits", BITS)
def test_a_damaged_message_is_detected(bits: int) -> None:
    values = torch.randn(1000)
    code = LatticeCode(bits, 1000, torch.float32)
    payload, snapshot = torch.empty(code.payload_bytes, dtype=torch.uint8), torch.empty(1000)
    checksum = code.encode(values, -8, payload, snapshot)
    payload[77] ^= 4
    with pytest.raises(OutsideRadius):
        code.difference(payload, checksum, -8, snapshot, torch.empty(1000))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    exponent=st.integers(-20, 5),
    pairs=st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=20),
)
def test_both_sides_decode_exactly_opposite_differences_or_both_refuse(
    bits: int, exponent: int, pairs: list[tuple[float, float]]
) -> None:
    mine, theirs = (torch.tensor(side) for side in zip(*pairs, strict=True))
    try:
        _, difference = meet(bits, exponent, theirs, mine)
    except OutsideRadius:
        with pytest.raises(OutsideRadius):
            meet(bits, exponent, mine, theirs)
        return
    _, opposite = meet(bits, exponent, mine, theirs)
    assert torch.equal(difference, -opposite)
    points = torch.round(theirs.double() / 2.0**exponent) - torch.round(mine.double() / 2.0**exponent)
    assert torch.equal(difference.double(), points * 2.0**exponent)


def test_the_step_is_a_power_of_two_or_follows_the_distance() -> None:
    assert Lattice(8, step=0.001).exponent(None) == -10
    assert Lattice(8, step=2.0**-10).exponent(5.0) == -10
    adaptive = Lattice(8, headroom=4)
    assert adaptive.exponent(None) is None
    assert adaptive.exponent(0.0) is None
    for distance in (1e-6, 0.003, 1.0, 77.0):
        exponent = adaptive.exponent(distance)
        assert exponent is not None
        assert 4 * distance <= 2.0**exponent * 127 < 8 * distance


def test_full_precision_has_the_same_interface() -> None:
    mine, theirs = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    code = FullPrecision(50, torch.float64)
    payload, snapshot, out = torch.empty(400, dtype=torch.uint8), torch.empty_like(mine), torch.empty_like(mine)
    code.encode(theirs, 0, payload, snapshot)
    assert torch.equal(snapshot, theirs)
    assert code.difference(payload, 0, 0, mine, out) == float((theirs - mine).abs().max())
    assert torch.equal(out, theirs - mine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lattice(5), "4, 8 or 16"),
        (lambda: Lattice(8, step=0.0), "step"),
        (lambda: Lattice(8, step=math.nan), "step"),
        (lambda: Lattice(8, headroom=0.5), "headroom"),
        (lambda: Lattice(4, headroom=4), "from 1 to 3.5"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError, match=message):
        make()
