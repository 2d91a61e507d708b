"""Second moments of the dense gradient: against their definition, in Adam's step, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch
from hvd_sketch import Anticipate, Compression, ConfigurationError, FactoredMoments, RankMismatchError
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process

RANKS = 3
B2 = 0.99
ROUNDING = (17 / 16) ** 6 - 1
"""Of an energy, a row and a column, each rounded by a sixteenth at most on every rank and in the sum."""


class Small(nn.Module):
    """Few coordinates, for which a sketch of 32 columns is exact; some that travel whole, and enough to gain by it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, 2, 2))
        self.vector = nn.Parameter(torch.zeros(7))
        self.whole = nn.Parameter(torch.zeros(4))
        self.rest = nn.Parameter(torch.zeros(400))


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Small().named_parameters()}


def run(
    steps: int,
    settings: FactoredMoments | None,
    clip_norm: float | None = None,
    spoil: Callable[[int], bool] = lambda step: False,
) -> list[list[dict[str, Any]]]:
    """Of every rank and step: by parameter its update, and Adam's running mean of squares after the step."""
    compressor = Compression.sketch(
        cols=32, k=3, dense_below=0, exclude=("whole",), clip_norm=clip_norm, half=False, anticipate=False
    )

    def on_rank(comm: Communicator) -> list[dict[str, Any]]:
        model = Small()
        optimizer: Any = hvd_sketch.DistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, B2)),
            model.named_parameters(),
            compressor,
            comm=comm,
            error_feedback=Anticipate(second_moments=settings),
        )
        seen = []
        for step in range(steps):
            optimizer.zero_grad()
            mine = gradients(comm.rank, step)
            if spoil(step) and comm.rank == 1:
                mine["kernel"].fill_(torch.nan)
            with optimizer.step_ahead():
                torch.stack([(p * mine[name]).sum() for name, p in model.named_parameters()]).sum().backward()
            optimizer.synchronize()
            updates = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            if not spoil(step):
                with optimizer.skip_synchronize():
                    optimizer.step()
            squares = {name: optimizer.optimizer.state[p].get("exp_avg_sq") for name, p in model.named_parameters()}
            seen.append({name: (updates[name], None if v is None else v.clone()) for name, v in squares.items()})
        return seen

    return run_in_process(RANKS, on_rank)


def defined(name: str, weights: list[float], clip_norm: float | None = None) -> Tensor:
    """v of one parameter from the first steps, by its definition, smoothed with these weights."""
    energies, matrices = zip(*(measured(name, step, clip_norm) for step in range(len(weights))), strict=True)
    energy = torch.stack([weight * each for weight, each in zip(weights, energies, strict=True)]).sum()
    matrix = torch.stack([weight * each for weight, each in zip(weights, matrices, strict=True)]).sum(dim=0)
    outer = torch.outer(matrix.sum(dim=1), matrix.sum(dim=0)) / matrix.sum().square()
    return (energy * outer).view(gradients(0, 0)[name].shape)


def measured(name: str, step: int, clip_norm: float | None) -> tuple[Tensor, Tensor]:
    """The energy of the mean gradient, and the mean square of the ranks' gradients as a matrix."""
    given = []
    for rank in range(RANKS):
        own = gradients(rank, step)
        norm = float(torch.cat([gradient.flatten() for gradient in own.values()]).norm())
        given.append(own[name] * (1.0 if clip_norm is None else min(1.0, clip_norm / norm)))
    stacked = torch.stack(given)
    matrix = stacked.square().mean(dim=0)
    matrix = matrix.flatten(1) if matrix.dim() > 1 else matrix.unsqueeze(0)
    return stacked.mean(dim=0).square().sum(), matrix


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["kernel", "vector"])
def test_adam_divides_by_what_was_computed_or_by_its_own_one_step(name: str, clip_norm: float | None) -> None:
    seen = run(2, FactoredMoments(), clip_norm)
    update, squares = seen[0][1][name]
    moments = defined(name, [0.999 / 1.999, 1.0 / 1.999], clip_norm)  # after each of the first two steps
    expected = torch.maximum(moments * (1 - B2**2), (1 - B2) * update.square())
    torch.testing.assert_close(squares, expected, rtol=ROUNDING, atol=1e-12)
    assert (squares / expected).log().mean().abs() < 0.12


def test_the_smoothed_moments_stand_still_between_measurements() -> None:
    """Over fourteen steps the moments of a measurement change in no step but those in which one is made."""
    steps = 14
    seen = run(steps, FactoredMoments())[0]
    moments = []
    for step in range(1, steps):
        update, squares = seen[step]["kernel"]
        floored = squares <= (1 - B2) * update.square() * 1.0001
        moments.append((squares / (1 - B2 ** (step + 1))).masked_fill(floored, torch.nan))
    changed = {
        step + 2  # counted from one; the first entry is of the second step
        for step, (before, after) in enumerate(zip([torch.zeros_like(moments[0]), *moments], moments, strict=False))
        if not torch.allclose(before[both := ~(before.isnan() | after.isnan())], after[both], rtol=1e-4)
    }
    assert changed == {2, 3, 4, 6, 8, 11, 14}


def test_what_travels_whole_keeps_adams_own() -> None:
    with_moments, without = run(1, FactoredMoments()), run(1, None)
    for name in ("kernel", "vector", "whole"):  # the first step is Adam's own for all
        torch.testing.assert_close(with_moments[0][0][name][1], without[0][0][name][1])
    update, squares = run(2, FactoredMoments())[0][1]["whole"]
    first = with_moments[0][0]["whole"][0]
    torch.testing.assert_close(squares, B2 * (1 - B2) * first.square() + (1 - B2) * update.square())


def test_all_ranks_have_the_same() -> None:
    seen = run(9, FactoredMoments())
    for step in zip(*seen, strict=True):
        for name in ("kernel", "vector", "whole"):
            assert all(torch.equal(rank[name][1], step[0][name][1]) for rank in step)


def test_a_void_step_measures_nothing() -> None:
    seen = run(4, FactoredMoments(), spoil=lambda step: step == 1)
    assert all(bool(value[1].isfinite().all()) for value in seen[0][3].values())


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("decay", -0.1), ("interval", 0)])
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"FactoredMoments {name} must be at least"):
        FactoredMoments(**{name: value})


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, betas=(0.9, 0.0), weight_decay=0.1)]
)
def test_an_optimizer_without_second_moments_is_refused(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = Small()
    with pytest.raises(ConfigurationError, match="is for torch.optim.Adam and AdamW"):
        hvd_sketch.DistributedOptimizer(
            make(model.parameters()),
            model.named_parameters(),
            Compression.sketch(cols=32, k=3, dense_below=0),
            error_feedback=Anticipate(second_moments=FactoredMoments()),
        )


def test_ranks_that_differ_in_it_are_told() -> None:
    def on_rank(comm: Communicator) -> None:
        model = Small()
        moments = FactoredMoments(interval=10 + comm.rank)
        optimizer: Any = hvd_sketch.DistributedOptimizer(
            torch.optim.Adam(model.parameters()),
            model.named_parameters(),
            Compression.sketch(cols=32, k=3, dense_below=0),
            comm=comm,
            error_feedback=Anticipate(second_moments=moments),
        )
        with optimizer.step_ahead():
            torch.stack([p.sum() for p in model.parameters()]).sum().backward()
        with pytest.raises(RankMismatchError, match="interval=11"):
            optimizer.step()

    run_in_process(2, on_rank)
