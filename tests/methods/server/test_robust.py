"""Synchronous rules that bear a minority: known answers, independent implementations, and their bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hvd_sketch.methods.server import (
    Krum,
    Mean,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
)
from tests.methods.server.support import Server, after_round, round_of, vector

ROWS = [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [4.0, 4.0], [100.0, -100.0]]
Floats = npt.NDArray[np.float64]


def test_known_answers_of_mean_median_trimmed_mean_and_krum() -> None:
    assert after_round(Mean(), ROWS).tolist() == pytest.approx([22.0, -16.8])
    assert after_round(Median(), ROWS).tolist() == [3.0, 4.0]
    assert after_round(TrimmedMean(1), ROWS).tolist() == pytest.approx([3.0, 10.0 / 3.0])
    assert Krum(1).scores(torch.tensor(ROWS)).tolist() == [18.0, 9.0, 10.0, 9.0, 40237.0]
    assert after_round(Krum(1), ROWS).tolist() == [2.0, 4.0]
    assert after_round(MultiKrum(1, 2), ROWS).tolist() == [3.0, 4.0]


def numpy_krum(rows: Floats, hostile: int, keep: int) -> Floats:
    distances = ((rows[:, None] - rows[None]) ** 2).sum(2)
    scores = [np.sort(np.delete(distances[i], i))[: len(rows) - hostile - 2].sum() for i in range(len(rows))]
    return np.asarray(rows[np.argsort(scores, kind="stable")[:keep]].mean(0))


def numpy_trimmed(rows: Floats, trim: int) -> Floats:
    columns = [sorted(column)[trim : len(column) - trim] for column in rows.T]
    return np.array([sum(column) / len(column) for column in columns])


@pytest.mark.parametrize("workers", [7, 8, 11])
@pytest.mark.parametrize(
    ("rule", "oracle"),
    [
        (lambda: Mean(), lambda rows: rows.mean(0)),
        (lambda: Median(), lambda rows: np.median(rows, axis=0)),
        (lambda: TrimmedMean(2), lambda rows: numpy_trimmed(rows, 2)),
        (lambda: Krum(2), lambda rows: numpy_krum(rows, 2, 1)),
        (lambda: MultiKrum(2, 4), lambda rows: numpy_krum(rows, 2, 4)),
    ],
    ids=["mean", "median", "trimmed", "krum", "multi-krum"],
)
def test_robust_means_equal_an_independent_implementation(
    workers: int, rule: Callable[[], Rule], oracle: Callable[[Floats], Floats]
) -> None:
    for seed in range(20):
        rows = np.random.default_rng(seed).standard_t(1.5, (workers, 30))
        np.testing.assert_allclose(after_round(rule(), torch.from_numpy(rows)).numpy(), oracle(rows), atol=1e-12)


def test_a_round_of_too_few_is_void_and_told() -> None:
    server = Server(Krum(1), vector(0.0), range(1, 6))
    server.take(server.store.leave(5, True, 0.0))
    round_of(server, [vector(1.0)] * 4)
    assert float(server.model) == 0.0
    assert [counts.refused for counts in server.store.stats.workers.values()] == [1, 1, 1, 1, 0]


def hostile(rows: Sequence[Sequence[float]], by: Tensor) -> Tensor:
    return torch.cat([torch.tensor(rows, dtype=torch.float64), by])


def test_a_minority_cannot_move_robust_means_out_of_the_range_of_the_others() -> None:
    honest = [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [4.0, 4.0], [2.0, 3.0]]
    for rule in (Median(), TrimmedMean(2), Krum(2)):
        for size in (1e3, 1e9):
            moved = after_round(rule, hostile(honest, torch.full((2, 2), size, dtype=torch.float64)))
            assert torch.all(moved >= vector(1.0, 2.0))
            assert torch.all(moved <= vector(4.0, 6.0))
