"""Real gradients for `benchmarks.recall`: of an embedding, a perceptron 4096 wide, and a convolution."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, EMBEDDED, CONTEXT = 20_000, 100, 8
STEPS = 5
"""Of plain SGD before the gradient is taken."""

Loss = Callable[[torch.Generator], Tensor]


def embedding(seed: int) -> Tensor:
    """Guess the next word from the mean of those before it; the gradient of the words' vectors."""
    torch.manual_seed(seed)
    words, table, guess = _text(), nn.Embedding(WORDS, EMBEDDED), nn.Linear(EMBEDDED, WORDS)

    def loss(generator: torch.Generator) -> Tensor:
        at = torch.randint(len(words) - CONTEXT, (512, 1), generator=generator) + torch.arange(CONTEXT + 1)
        seen = words[at]
        return F.cross_entropy(guess(table(seen[:, :-1]).mean(dim=1)), seen[:, -1])

    return _gradient(nn.ModuleList([table, guess]), table.weight, loss, seed, 5.0)


def perceptron(seed: int) -> Tensor:
    """Read digits with hidden layers of 512 and 4096; the gradient between them."""
    torch.manual_seed(seed)
    wide = nn.Linear(512, 4096)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), wide, nn.ReLU(), nn.Linear(4096, 10))
    return _gradient(model, wide.weight, _digits(model), seed, 0.1)


def convolution(seed: int) -> Tensor:
    """Read digits with three convolutions; the gradient of the last, 3 x 3 from 256 channels to 512."""
    torch.manual_seed(seed)
    last = nn.Conv2d(256, 512, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 256, 3, padding=1, stride=2),
        nn.ReLU(),
        last,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return _gradient(model, last.weight, _digits(model), seed, 0.1)


GRADIENTS = {"embedding": embedding, "perceptron": perceptron, "convolution": convolution}


def _gradient(model: nn.Module, parameter: Tensor, loss: Loss, seed: int, rate: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        loss(generator).backward()
        if step < STEPS:
            optimizer.step()
    assert parameter.grad is not None
    return parameter.grad.flatten()


def _digits(model: nn.Module) -> Loss:
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16.0
    labels = torch.from_numpy(data.target)

    def loss(generator: torch.Generator) -> Tensor:
        at = torch.randint(len(images), (64,), generator=generator)
        return F.cross_entropy(model(images[at]), labels[at])

    return loss


@cache
def _text() -> Tensor:
    """The words of the standard library's modules, by their rank; the rare ones share the last."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    words = [
        word
        for file in sorted(folder.glob("*.py"))
        for word in re.findall(r"\w+|[^\w\s]", file.read_text(encoding="utf-8", errors="replace"))
    ]
    rank = {word: number for number, (word, _) in enumerate(Counter(words).most_common(WORDS - 1))}
    return torch.tensor([rank.get(word, WORDS - 1) for word in words])
