"""Three small trainings on data that every Python with scikit-learn has."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 48
VOCABULARY = 128

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its optimizer as tuned for dense training, and where its batches come from.

    ``batch(generator, size)`` draws a training batch; ``held_out()`` is the fixed validation set;
    ``clip`` is the norm that the summed gradient is clipped to before a step, in dense training too.
    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batch: Callable[[torch.Generator, int], Batch]
    held_out: Callable[[], Batch]
    batch_size: int
    steps: int
    clip: float | None = None


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        mixed = self.mix(self.norm1(x)).view(rows, length, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        result: Tensor = x + self.feed(self.norm2(x))
        return result


class Transformer(nn.Module):
    """A character-level language model of about 0.27 million parameters."""

    def __init__(self, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.place)))
        return logits.flatten(0, 1)


class Recurrent(nn.Module):
    """A character-level LSTM of about 0.17 million parameters."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embed(x))[0])
        return logits.flatten(0, 1)


def convolutional() -> nn.Module:
    """A small CNN with BatchNorm, about 0.1 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@lru_cache(maxsize=1)
def _sources() -> tuple[Tensor, Tensor]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = files[::10]
    train = [file for file in files if file not in held_out]
    return _characters(train), _characters(held_out)


def _characters(files: list[Path]) -> Tensor:
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64).clamp_(max=VOCABULARY - 1)


def _windows(text: Tensor, generator: torch.Generator, size: int) -> Batch:
    starts = torch.randint(len(text) - CONTEXT - 1, (size, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:].flatten()


def _text_batch(generator: torch.Generator, size: int) -> Batch:
    return _windows(_sources()[0], generator, size)


def _text_held_out() -> Batch:
    return _windows(_sources()[1], torch.Generator().manual_seed(12345), 256)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # longer to import than PyTorch, and not every task needs it

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return images[order], torch.tensor(digits.target)[order]


def _digits_batch(generator: torch.Generator, size: int) -> Batch:
    images, labels = _digits()
    chosen = torch.randint(len(labels) - 400, (size,), generator=generator)
    return images[400:][chosen], labels[400:][chosen]


def _digits_held_out() -> Batch:
    images, labels = _digits()
    return images[:400], labels[:400]


TASKS = {
    task.name: task
    for task in (
        Task(
            "transformer-adamw",
            Transformer,
            lambda model: torch.optim.AdamW(model.parameters(), lr=6e-3),
            _text_batch,
            _text_held_out,
            batch_size=4,
            steps=600,
        ),
        Task(
            "lstm-sgd-clip",
            Recurrent,
            lambda model: torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9),
            _text_batch,
            _text_held_out,
            batch_size=4,
            steps=600,
            clip=0.25,
        ),
        Task(
            "cnn-batchnorm",
            convolutional,
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
            _digits_batch,
            _digits_held_out,
            batch_size=8,
            steps=400,
        ),
    )
}


def parameters(task: Task) -> int:
    """How many numbers a task trains."""
    return sum(parameter.numel() for parameter in task.model().parameters())
