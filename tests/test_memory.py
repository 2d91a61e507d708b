"""The memory: what was sent plus what is kept equals what was computed, for every kind of momentum."""

import pytest
import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.memory import Memory, Momentum
from hvd_sketch.sketch import CountSketch
from hvd_sketch.sparse.chosen import Chosen
from tests.support.simulation import UNIT_ROUNDOFF, heavy_tailed

TOTAL, COMPRESSED, STEPS = 300, 250, 12
KINDS = [
    None,
    Momentum(0.9, masking=False),
    Momentum(0.9, masking=True),
    Momentum(0.9, nesterov=True, masking=False),
    Momentum(0.9, nesterov=True, masking=True),
]


def reference(gradients: Tensor, clip: float, momentum: Momentum | None, sent: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Velocity and residual after all steps, by the formulas of the papers, in float64."""
    factor = momentum.factor if momentum else 0.0
    u = torch.zeros(TOTAL, dtype=torch.float64)
    v = torch.zeros(TOTAL, dtype=torch.float64)
    for gradient, where in zip(gradients.double() * clip, sent, strict=True):
        if momentum is not None and momentum.nesterov:
            u = factor * (u + gradient)
            v = v + u + gradient
        else:
            u = factor * u + gradient
            v = v + u
        v[where] = 0.0
        v[COMPRESSED:] = 0.0
        if momentum is not None and momentum.masking:
            u[where] = 0.0
    return u, v


@pytest.mark.parametrize("momentum", KINDS, ids=str)
@pytest.mark.parametrize("clip", [1.0, 0.37])
def test_recurrences_are_those_of_the_papers(momentum: Momentum | None, clip: float) -> None:
    gradients = heavy_tailed(STEPS, TOTAL)
    sent = [torch.randperm(COMPRESSED, generator=torch.Generator().manual_seed(t))[:60] for t in range(STEPS)]
    memory = Memory(TOTAL, torch.device("cpu"), momentum)
    for gradient, where in zip(gradients, sent, strict=True):
        computed = memory.computed(gradient, clip, slice(None))
        memory.absorb(gradient, clip)
        torch.testing.assert_close(computed, memory.residual, rtol=4 * UNIT_ROUNDOFF, atol=1e-5)
        memory.keep(slice(COMPRESSED, None), 0.0, mask=False)
        memory.keep(Chosen(where), 0.0, mask=True)
    velocity, residual = reference(gradients, clip, momentum, sent)
    accumulated = gradients.abs().sum(0).max().item() * 10  # 1 / (1 - 0.9)
    tolerance = 6 * STEPS * UNIT_ROUNDOFF * accumulated
    torch.testing.assert_close(memory.residual.double(), residual, rtol=0, atol=tolerance)
    if memory.velocity is not None:
        torch.testing.assert_close(memory.velocity.double(), velocity, rtol=0, atol=tolerance)


@pytest.mark.parametrize("momentum", KINDS, ids=str)
def test_the_sketch_of_carried_and_fresh_parts_is_the_sketch_of_what_is_computed(momentum: Momentum | None) -> None:
    """Linearity: what lets a gradient be sketched before the clip factor is known."""
    memory = Memory(TOTAL, torch.device("cpu"), momentum)
    memory.absorb(heavy_tailed(TOTAL, seed=1), 1.0)
    gradient, clip = heavy_tailed(TOTAL, seed=2), 0.37
    carried, fresh, whole = (CountSketch(TOTAL, 3, 64, seed=5) for _ in range(3))
    memory.sketch_carried(carried)
    fresh.add(gradient)
    whole.add(memory.computed(gradient, clip, slice(None)))
    table = carried.table + fresh.table * (memory.gain * clip)
    magnitude = memory.residual.abs().sum().item() + 2 * gradient.abs().sum().item()
    torch.testing.assert_close(table, whole.table, rtol=0, atol=16 * UNIT_ROUNDOFF * magnitude)


def test_masking_clears_only_what_was_sent_and_is_open_to_it() -> None:
    memory = Memory(TOTAL, torch.device("cpu"), Momentum(0.5))
    memory.absorb(torch.ones(TOTAL), 1.0)
    memory.keep(Chosen(torch.tensor([3, 5])), 0.0, mask=True)
    memory.keep(slice(COMPRESSED, None), 0.0, mask=False)
    assert memory.velocity is not None
    assert memory.velocity.eq(0.0).nonzero().flatten().tolist() == [3, 5]
    assert memory.residual.eq(0.0).nonzero().flatten().tolist() == [3, 5, *range(COMPRESSED, TOTAL)]


def test_state_holds_copies_and_comes_back() -> None:
    memory = Memory(TOTAL, torch.device("cpu"), Momentum(0.9))
    memory.absorb(heavy_tailed(TOTAL), 1.0)
    state = memory.state_dict()
    saved = {name: value.clone() for name, value in state.items()}
    memory.reset()
    assert not memory.residual.any()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    memory.load_state_dict(state)
    assert torch.equal(memory.residual, saved["residual"])


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.9, float("nan")])
def test_a_factor_outside_its_range_is_refused(factor: float) -> None:
    with pytest.raises(ConfigurationError, match="momentum factor must be between 0 and 1"):
        Momentum(factor)


def test_the_memory_is_single_precision_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert Memory(3, torch.device("cpu"), Momentum(0.9)).residual.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
