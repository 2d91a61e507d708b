"""Heterogeneous strongly convex quadratics, a different one on every rank, with a known common optimum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIZE = 20


class Quadratics:
    """``f_i(x) = (x - b_i)^T A_i (x - b_i) / 2`` with eigenvalues 1 … 4 and optima b_i far apart, float64."""

    def __init__(self, ranks: int, spread: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.matrices, self.centres = [], []
        for _ in range(ranks):
            basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
            self.matrices.append(basis @ torch.diag(torch.linspace(1, 4, SIZE, dtype=torch.float64)) @ basis.T)
            self.centres.append(spread * torch.randn(SIZE, generator=generator, dtype=torch.float64))
        total = torch.stack(self.matrices).sum(dim=0)
        pulls = [matrix @ centre for matrix, centre in zip(self.matrices, self.centres, strict=True)]
        self.optimum = torch.linalg.solve(total, torch.stack(pulls).sum(dim=0))

    def loss(self, rank: int, x: Tensor) -> Tensor:
        away = x - self.centres[rank]
        return torch.dot(away, self.matrices[rank] @ away) / 2


class Point(torch.nn.Module):
    """A model that is one vector, float64, zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))


def distances(
    make: Callable[[Point], Any], rank: int, ranks: int, steps: int, every: int, spread: float = 1.0
) -> list[float]:
    """Train on this rank's quadratic; the distance to the common optimum after every ``every`` steps."""
    problem, model, seen = Quadratics(ranks, spread), Point(), []
    optimizer = make(model)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        problem.loss(rank, model.x).backward()
        optimizer.step()
        if step % every == 0:
            seen.append(float(torch.linalg.vector_norm(model.x.detach() - problem.optimum)))
    return seen
