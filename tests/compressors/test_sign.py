"""Scaled sign: its definition on one way and on two, the bytes it says, and few coordinates for many ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError, wire
from tests.support.simulation import heavy_tailed, simulate

PLAIN: dict[str, Any] = {"clip_norm": None, "dense_below": 0}
SHAPES = {"a.weight": (13, 7), "b.bias": (5,), "b.weight": (40, 3)}
TENSORS, TOTAL = (91, 5, 120), 216


def scaled_sign(vector: Tensor, shard: slice = slice(None)) -> Tensor:
    """``mean |v| sign(v)`` tensor by tensor, of what a shard has of each; the scale as bfloat16."""
    result, owned = torch.zeros_like(vector), torch.zeros_like(vector)
    owned[shard] = 1.0
    for part, into, mine in zip(*(each.split(TENSORS) for each in (vector, result, owned)), strict=True):
        scale = ((part * mine).abs().sum() / mine.sum().clamp(min=1)).to(torch.bfloat16).float()
        into.copy_(mine * torch.where(part < 0, -scale, scale))
    return result


def by_definition(gradients: Tensor, *, both_ways: bool) -> tuple[list[Tensor], Tensor]:
    """The updates, and what the ranks keep."""
    size = len(gradients)
    memory, updates = torch.zeros(size, TOTAL), []
    for step in gradients.unbind(1):
        memory += step
        sent = torch.stack([scaled_sign(vector) for vector in memory])
        for rank in range(size) if both_ways else ():
            sent[rank, rank::size] = 0.0
        memory -= sent
        summed = sent.sum(0)
        for rank in range(size) if both_ways else ():
            shard = slice(rank, None, size)
            memory[rank, shard] += summed[shard]
            summed[shard] = scaled_sign(memory[rank], shard)[shard]
            memory[rank, shard] -= summed[shard]
        updates.append(summed / size)
    return updates, memory


@pytest.mark.parametrize("both_ways", [False, True], ids=["one way", "two ways"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_updates_and_memories_are_those_of_the_definition(size: int, both_ways: bool) -> None:
    gradients = heavy_tailed(size, 6, TOTAL)
    updates, memory = by_definition(gradients, both_ways=both_ways)
    runs = simulate(Compression.sign(both_ways=both_ways, **PLAIN), gradients, SHAPES)
    assert 0.0 < runs[0].exchange.stats.captured_energy < 1.0
    for rank, run in enumerate(runs):
        torch.testing.assert_close(run.updates, torch.stack(updates), rtol=0, atol=2e-6 * float(gradients.abs().max()))
        torch.testing.assert_close(run.residual, memory[rank], rtol=0, atol=2e-6 * float(gradients.abs().max()))


@pytest.mark.parametrize("size", [2, 8])
def test_it_sends_a_bit_a_coordinate_two_bytes_a_scale_and_a_seal(size: int) -> None:
    gradients, shapes = heavy_tailed(size, 4, 40_960), {"one": (160, 128), "two": (20_480,)}
    header = 2 * (size - 1) * 2 * wire.HEADER // size
    for compressor, parts, ways in (
        (Compression.sign(both_ways=False, **PLAIN), 1, 1),
        (Compression.sign(**PLAIN), size, 2),
    ):
        exchange = simulate(compressor, gradients, shapes)[0].exchange
        agreed = simulate(compressor, gradients[:, :1], shapes)[0].exchange.stats
        sent = exchange.stats.bytes_sent - agreed.bytes_sent
        assert sent == 3 * (header + ways * (size - 1) * (40_960 // parts // 8 + 2 * len(shapes) + wire.SEAL))
        assert (exchange.stats.dense_bytes - agreed.dense_bytes) / sent > 0.95 * (32 if ways == 2 else 64 / size)


def test_more_ranks_than_coordinates() -> None:
    """Some own nothing then; and a tensor without a gradient is left alone."""
    gradients = heavy_tailed(6, 5, 4)
    gradients[:, :, 1:] = 0.0
    runs = simulate(Compression.sign(**PLAIN), gradients, {"a": (1,), "b": (3,)})
    assert all(torch.equal(run.updates, runs[0].updates) for run in runs)
    assert runs[0].updates[:, 0].all()
    assert not runs[0].updates[:, 1:].any()


def test_the_first_steps_are_dense_where_asked_for() -> None:
    gradients = heavy_tailed(2, 4, TOTAL)
    runs = simulate(Compression.sign(start_step=3, **PLAIN), gradients, SHAPES)
    torch.testing.assert_close(runs[0].updates[:3], gradients.mean(0)[:3])
    assert not torch.allclose(runs[0].updates[3], gradients.mean(0)[3])
    with pytest.raises(ConfigurationError, match="start_step must be at least 0, got -1"):
        Compression.sign(start_step=-1)
