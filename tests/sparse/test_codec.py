"""The code for sparse vectors: what comes out is what went in, in as many bytes as promised."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.sparse.codec import SparseCodec
from tests.support.without_kernel import without_kernel


def draw(codec: SparseCodec, vectors: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(codec.universe, generator=generator)[: codec.count] for _ in range(vectors)]
    return torch.stack(rows).sort(dim=1).values, torch.randn(vectors, codec.count, generator=generator) ** 3


def bits_of(tensor: Tensor) -> Tensor:
    """What is not a number is equal to itself then."""
    return tensor.view(torch.int32) if tensor.is_floating_point() else tensor


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.data(), st.integers(1, 3), st.integers(0, 2**31))
def test_the_receiver_sees_what_was_promised(universe: int, data: st.DataObject, vectors: int, seed: int) -> None:
    codec = SparseCodec(universe, data.draw(st.integers(1, universe)))
    indices, values = draw(codec, vectors, seed)
    code, promised = codec.encode(indices, values)
    assert code.dtype == torch.uint8
    assert code.shape == (vectors, codec.nbytes)
    found, decoded, known = codec.decode(code)
    assert known.all()
    assert torch.equal(found, indices)
    assert torch.equal(decoded, promised)


@pytest.mark.parametrize("count", [3, 46, 165, 50_000])
def test_the_error_of_values_is_that_of_the_docstring(count: int) -> None:
    codec = SparseCodec(100_000, count)
    indices, values = draw(codec, 1, 0)
    _, decoded = codec.encode(indices, values)
    error, exact = (decoded - values).double(), values.double()
    assert (error.abs() <= torch.maximum(exact.abs(), exact.abs().max() / 2**6) * (1 + 2**-7)).all()
    assert (decoded * values >= 0).all()
    assert error.norm() <= exact.norm()
    torch.testing.assert_close(decoded.double().abs().sum(), exact.abs().sum(), rtol=2**-8, atol=0.0)


@pytest.mark.parametrize(("count", "nbytes"), [(165, 294), (46, 103)])  # 14.3 and 17.9 bits each
def test_a_small_code_has_the_size_of_the_docstring(count: int, nbytes: int) -> None:
    codec = SparseCodec(31_648, count)
    indices, values = draw(codec, 1, 0)
    assert codec.encode(indices, values)[0].shape == (1, nbytes)


@pytest.mark.parametrize("by", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("mean", "sent"),
    [
        (0x3F808000, 0x3F800000),  # of two as near, the even one
        (0x3F818000, 0x3F820000),
        (0x3F808001, 0x3F810000),
        (0x3F807FFF, 0x3F800000),
        (0x00008000, 0x00000000),
        (0x00008001, 0x00010000),
        (0x7F7F7FFF, 0x7F7F0000),
        (0x7F7F8000, 0x7F7F0000),  # and not infinite
        (0x7F7FFFFF, 0x7F7F0000),
        (0x7F800000, 0x7F800000),
        (0x7F800001, 0x7FC00000),
        (0x7FFFFFFF, 0x7FC00000),
    ],
)
def test_a_level_is_rounded_to_the_nearest(by: str, mean: int, sent: int) -> None:
    codec = SparseCodec(2, 2)
    value = torch.tensor([[0, mean]], dtype=torch.int32).view(torch.float32)
    for factor in (1, -1):
        with without_kernel() if by == "reference" else nullcontext():
            code, decoded = codec.encode(torch.tensor([[0, 1]]), value * factor)
            _, back, _ = codec.decode(code)
        bits = sent | 1 << 31 if factor < 0 and not value.isnan().any() else sent
        assert decoded.view(torch.int32).tolist() == back.view(torch.int32).tolist()
        assert decoded.view(torch.int32)[0].tolist() == [0, bits - (bits >> 31 << 32)]
        assert code[0, : codec.LEVEL_BYTES].view(torch.int16).tolist().count(sent >> 16) >= 1


def test_the_heaviest_value_keeps_its_size() -> None:
    codec = SparseCodec(100, 50)
    indices, values = draw(codec, 1, 1)
    values[0, 7] = -100.0
    _, decoded = codec.encode(indices, values)
    assert decoded[0, 7] == -100.0


def test_zeros_stay_zeros() -> None:
    codec = SparseCodec(10, 3)
    indices = torch.tensor([[0, 4, 9], [1, 2, 3]])
    values = torch.tensor([[0.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    _, decoded = codec.encode(indices, values)
    assert torch.equal(decoded, values)


@pytest.mark.parametrize("density", [0.5, 0.05, 0.005, 0.0005])
def test_an_index_costs_about_two_bits_more_than_the_logarithm_of_the_gap(density: float) -> None:
    universe = 2_000_000
    codec = SparseCodec(universe, int(universe * density))
    bits = 8 * (codec.nbytes - codec.LEVEL_BYTES - codec.count / 2) / codec.count
    assert bits <= 3 + torch.tensor(1 / density).log2().item()


def test_large_universes_do_not_overflow() -> None:
    codec = SparseCodec(2**40, 3)
    indices = torch.tensor([[5, 2**33 + 1, 2**40 - 1]])
    found, _, _ = codec.decode(codec.encode(indices, torch.ones(1, 3))[0])
    assert torch.equal(found, indices)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20_000), st.data(), st.integers(1, 3), st.integers(0, 2**31))
def test_the_kernel_writes_the_bytes_of_the_reference(
    universe: int, data: st.DataObject, vectors: int, seed: int
) -> None:
    codec = SparseCodec(universe, data.draw(st.integers(1, universe)))
    indices, values = draw(codec, vectors, seed)
    values *= data.draw(st.sampled_from([1.0, 2.0**-126, 2.0**-140, 1e30]))
    special = [0.0, -0.0, 4.0, -1e-30, 3.4e38, torch.inf, -torch.inf, torch.nan]
    values[:, :: data.draw(st.integers(2, 9))] = data.draw(st.sampled_from(special))
    ours = codec.encode(indices, values)
    with without_kernel():
        reference = codec.encode(indices, values)
        decoded = codec.decode(reference[0])
    for one, other in zip((*ours, *codec.decode(ours[0])), (*reference, *decoded), strict=True):
        assert torch.equal(bits_of(one), bits_of(other))


def test_levels_begin_at_octaves_of_the_least() -> None:
    least = torch.tensor(1.1)
    octaves = least * 2.0 ** torch.arange(6)
    values = torch.cat([octaves, octaves.nextafter(torch.tensor(0.0))[1:]]).unsqueeze(0)
    _, decoded = SparseCodec(11, 11).encode(torch.arange(11).unsqueeze(0), values)
    below = values[:, 6:]
    means = ((values[:, :5] + below) / 2).bfloat16().float()
    assert torch.equal(decoded[:, :5], means)
    assert torch.equal(decoded[:, 6:], means)


@pytest.mark.parametrize("by", ["kernel", "reference"])
def test_what_is_no_code_is_known(by: str) -> None:
    codec = SparseCodec(1000, 37)
    code, _ = codec.encode(*draw(codec, 2, 0))
    damages = [code.clone() for _ in range(5)]
    damages[0][1, -10:] = 255  # too many indices
    damages[1][0, -10:] = 0  # too few
    wrong = SparseCodec(1500, 37)  # of as many bytes or more, and larger indices
    indices = torch.arange(1463, 1500).unsqueeze(0)
    larger, _ = wrong.encode(indices, torch.ones(1, 37))
    assert larger.shape[1] >= codec.nbytes
    damages[2][:] = larger[:, : codec.nbytes]
    twice = torch.arange(37).unsqueeze(0).clone()
    twice[0, 20] = 19
    damages[3][1:], _ = codec.encode(twice, torch.ones(1, 37))
    damages[4][0, -1] ^= 1  # a bit behind the last
    for damaged, bad in zip(damages, ([1], [0], [0, 1], [1], [0]), strict=True):
        with without_kernel() if by == "reference" else nullcontext():
            indices, _, known = codec.decode(damaged)
        assert known.logical_not().nonzero().flatten().tolist() == bad
        assert (indices[:, 1:] > indices[:, :-1]).all()
        assert indices.max() < codec.universe
