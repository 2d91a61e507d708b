"""Handwritten digits for experiments with a server: shares for workers, trusted ones, and ones to look at."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = 10
TRUSTED = 137


class Digits(NamedTuple):
    """Images (n, 64), float32 from 0 to 1, and what they show."""

    images: Tensor
    labels: Tensor

    def at(self, where: Tensor | slice) -> Digits:
        """Some of them."""
        return Digits(self.images[where], self.labels[where])

    def batch(self, generator: torch.Generator, size: int) -> Digits:
        """Some at random."""
        return self.at(torch.randint(len(self.labels), (size,), generator=generator))


class Split(NamedTuple):
    """1300 digits for the workers, 137 that the server trusts, 360 to test."""

    workers: Digits
    trusted: Digits
    test: Digits


@cache
def split() -> Split:
    """The same for everybody."""
    loaded = load_digits()
    digits = Digits(torch.from_numpy(loaded.images).float().flatten(1) / 16.0, torch.from_numpy(loaded.target))
    testing = torch.arange(len(digits.labels)) % 5 == 0
    others = digits.at(~testing)
    order = torch.randperm(len(others.labels), generator=torch.Generator().manual_seed(0))
    return Split(others.at(order[TRUSTED:]), others.at(order[:TRUSTED]), digits.at(testing))


def network(seed: int, width: int = 64) -> nn.Sequential:
    """A perceptron of two layers, 4810 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES))


def loss_of(model: nn.Module, digits: Digits) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(model(digits.images), digits.labels)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share that is read correctly."""
    return float((model(digits.images).argmax(1) == digits.labels).float().mean())
