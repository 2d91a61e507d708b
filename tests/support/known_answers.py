"""SketchedSGD by hand: four samples, two weights, a sketch without collisions.

Loss ``sum (y - X w)^2`` over X = [[0,1],[2,3],[4,5],[6,7]], y = [0,1,2,3], from w = 0 at learning rate 0.005,
gradients summed over the workers, each of which holds a contiguous share of the samples, and momentum masked where it
was sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

X = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
Y = torch.tensor([0.0, 1.0, 2.0, 3.0])
LEARNING_RATE = 0.005

WEIGHTS: dict[tuple[int, float], list[tuple[float, float]]] = {
    (2, 0.0): [(0.28, 0.34), (0.172, 0.204), (0.21696, 0.25568)],
    (2, 0.9): [(0.28, 0.34), (0.172, 0.204), (0.21696, 0.25568)],
    (1, 0.0): [(0.0, 0.34), (0.3288, 0.34), (0.193472, 0.34)],
    (1, 0.9): [(0.0, 0.34), (0.5808, 0.34), (0.304352, 0.34)],
}
"""The weights after each of three steps, by k and momentum; the same for one worker and for two."""


def loss(weights: Tensor, rank: int, size: int) -> Tensor:
    """The loss over one worker's share."""
    return (Y.chunk(size)[rank] - X.chunk(size)[rank] @ weights).square().sum()


def gradient(weights: Tensor, rank: int, size: int) -> Tensor:
    """Its gradient."""
    x, y = X.chunk(size)[rank], Y.chunk(size)[rank]
    return 2 * x.T @ (x @ weights - y)
