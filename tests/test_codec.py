"""The code for sparse vectors: what comes out is what went in, in as many bytes as promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.codec import SparseCodec


def draw(codec: SparseCodec, vectors: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(codec.universe, generator=generator)[: codec.count] for _ in range(vectors)]
    return torch.stack(rows).sort(dim=1).values, torch.randn(vectors, codec.count, generator=generator) ** 3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.data(), st.integers(1, 3), st.integers(0, 2**31))
def test_the_receiver_sees_what_was_promised(universe: int, data: st.DataObject, vectors: int, seed: int) -> None:
    codec = SparseCodec(universe, data.draw(st.integers(1, universe)))
    indices, values = draw(codec, vectors, seed)
    code, promised = codec.encode(indices, values)
    assert code.dtype == torch.uint8
    assert code.shape == (vectors, codec.nbytes)
    found, decoded = codec.decode(code)
    assert torch.equal(found, indices)
    assert torch.equal(decoded, promised)


def test_the_error_of_values_is_that_of_the_docstring() -> None:
    codec = SparseCodec(100_000, 50_000)
    indices, values = draw(codec, 1, 0)
    _, decoded = codec.encode(indices, values)
    assert ((decoded - values).abs() <= torch.maximum(values.abs(), values.abs().max() / 2**6) * (1 + 1e-6)).all()
    assert (decoded * values >= 0).all()
    torch.testing.assert_close(decoded.double().abs().sum(), values.double().abs().sum(), rtol=1e-4, atol=0.0)


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
    bits = 8 * (codec.nbytes - 32 - codec.count / 2) / codec.count
    assert bits <= 3 + torch.tensor(1 / density).log2().item()


def test_large_universes_do_not_overflow() -> None:
    codec = SparseCodec(2**40, 3)
    indices = torch.tensor([[5, 2**33 + 1, 2**40 - 1]])
    found, _ = codec.decode(codec.encode(indices, torch.ones(1, 3))[0])
    assert torch.equal(found, indices)
