"""The quantiser of differences: unbiased, within its bound, and finite at the extremes."""

import math

import pytest
import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.gossip.infnorm import InfNorm, InfNormCode


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inf_norm_is_unbiased_and_bounded(bits: int, dtype: torch.dtype) -> None:
    values = torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(3))
    code = InfNormCode(InfNorm(bits, block=128), 1000, dtype, seed=5)
    assert code.message_bytes == 8 * 4 + 1024 * bits // 8
    message, decoded = torch.empty(code.message_bytes, dtype=torch.uint8), torch.empty_like(values)
    scales = torch.nn.functional.pad(values, (0, 24)).view(8, 128).abs().amax(dim=1).repeat_interleave(128)[:1000]
    spacing, total, repeats = scales / (2 ** (bits - 1) - 1), torch.zeros_like(values), 2000
    for _ in range(repeats):
        code.encode(values, message)
        code.decode(message, decoded)
        assert float(((decoded - values).abs() / spacing).max()) < 1.0 + 1e-5
        total += decoded
    # a coordinate's standard deviation is at most half the spacing; 6 of them for 1000 coordinates
    assert float(((total / repeats - values).abs() / spacing).max()) < 6 * 0.5 / math.sqrt(repeats)


def test_inf_norm_keeps_zeros_and_extremes() -> None:
    values = torch.tensor([0.0, 0.0, 1e-42, -3e38])
    for block in (1, 2, 512):
        code = InfNormCode(InfNorm(8, block), 4, torch.float32, seed=0)
        message, decoded = torch.empty(code.message_bytes, dtype=torch.uint8), torch.empty(4)
        for _ in range(100):
            code.encode(values, message)
            code.decode(message, decoded)
            assert decoded.isfinite().all()
            assert decoded[0] == 0
            assert float(decoded[3]) == pytest.approx(-3e38, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfNorm(3), "2, 4 or 8"),
        (lambda: InfNorm(2, 0), "block"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError, match=message):
        make()
