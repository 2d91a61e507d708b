"""Models of about 1, 10 and 60 million parameters whose forward and backward pass cost little.

What is measured is the exchange, so batches are tiny; the shapes and numbers of tensors are those of real networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

_VOCABULARY = 1024
_TOKENS = 4
_SIDE = 8  # pixels
_CLASSES = 10


class Transformer(nn.Module):
    """A small language model: embedding, encoder layers, and a prediction for every position."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, nhead=width // 32, dim_feedforward=4 * width, dropout=0.0, batch_first=True
        )
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, _VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch * positions, vocabulary) of tokens (batch, positions), int64."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)))
        return logits.flatten(0, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> Batch:
        """One random sequence and what should follow each of its tokens."""
        tokens = torch.randint(_VOCABULARY, (1, _TOKENS + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:].flatten()


class ConvNet(nn.Module):
    """Four strided 3x3 convolutions, of 1, 2, 4 and 4 times ``width`` channels, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels)
        )
        self.head = nn.Linear(channels[-1], _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width), float32."""
        for convolution in self.convolutions:
            images = torch.relu(convolution(images))
        logits: Tensor = self.head(images.flatten(2).mean(2))
        return logits

    @staticmethod
    def batch(generator: torch.Generator) -> Batch:
        """One random image and a class."""
        images = torch.randn(1, 3, _SIDE, _SIDE, generator=generator)
        return images, torch.randint(_CLASSES, (1,), generator=generator)


Model = Transformer | ConvNet

MODELS: Mapping[str, Callable[[], Model]] = {
    "transformer-0.4M": lambda: Transformer(96, 2),
    "transformer-1M": lambda: Transformer(128, 4),
    "cnn-1M": lambda: ConvNet(64),
    "transformer-10M": lambda: Transformer(320, 8),
    "cnn-10M": lambda: ConvNet(208),
    "transformer-60M": lambda: Transformer(768, 8),
    "cnn-60M": lambda: ConvNet(512),
}


def parameters_of(name: str) -> int:
    """Number of parameters of a model, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MODELS[name]().parameters())
