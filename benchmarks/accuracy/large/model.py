"""What learns it: a transformer, and its loss and gradients on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.large.text import VOCABULARY, Batch
from benchmarks.accuracy.tasks import Block


@dataclass(frozen=True)
class Size:
    """Of a training: the model, a rank's batch, and the learning rate that suits them."""

    width: int
    layers: int
    context: int
    batch: int
    rate: float
    text_bytes: int
    held_out: int
    half: bool = True
    """Whether products are computed in bfloat16, which takes a processor long."""


LARGE = Size(width=512, layers=10, context=512, batch=4, rate=1e-3, text_bytes=64 << 20, held_out=128)
MEDIUM = Size(width=192, layers=6, context=128, batch=2, rate=1e-3, text_bytes=16 << 20, held_out=64, half=False)
SMALL = Size(width=64, layers=2, context=32, batch=2, rate=3e-3, text_bytes=1 << 20, held_out=8)


class Language(nn.Module):
    """A language model of bytes, with float32 parameters."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.in_half = size.half
        self.embed = nn.Embedding(VOCABULARY, size.width)
        self.place = nn.Parameter(0.02 * torch.randn(size.context, size.width))
        self.blocks = nn.Sequential(*[Block(size.width, size.width // 64 or 1) for _ in range(size.layers)])
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, VOCABULARY, bias=False)
        self._place_small()

    def _place_small(self) -> None:
        """What is added to the stream begins small, and less so the more layers add to it."""
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.out, block.feed[-1]):
                nn.init.normal_(last.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The logits of every next byte, one row for each."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.place)))
        return logits.flatten(0, 1)


def loss_of(model: Language, batch: Batch) -> Tensor:
    """The mean cross entropy."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=model.in_half):
        logits = model(inputs)
    return F.cross_entropy(logits.float(), targets)


class Gradient:
    """Loss and gradients of a model for batches of one shape; on a GPU a graph that is recorded once.

    After a call every parameter's ``grad`` is that of the batch, in the same tensor each time.
    """

    def __init__(self, model: Language, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self._graph: torch.cuda.CUDAGraph | None = None
        if batch[0].device.type == "cuda":
            self._record()

    def __call__(self, batch: Batch) -> Tensor:
        """The loss."""
        if self._graph is None:
            self._model.zero_grad()
            loss = loss_of(self._model, batch)
            loss.backward()
            return loss.detach()
        for tensor, new in zip(self._batch, batch, strict=True):
            tensor.copy_(new)
        self._graph.replay()
        return self._loss

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._model.zero_grad()
                loss_of(self._model, self._batch).backward()
        torch.cuda.current_stream().wait_stream(stream)
        self._model.zero_grad()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            loss = loss_of(self._model, self._batch)
            loss.backward()
        self._loss = loss.detach()


def evaluate(model: Language, batches: list[Batch]) -> float:
    """The mean loss on batches of one shape."""
    with torch.no_grad():
        return float(torch.stack([loss_of(model, batch) for batch in batches]).mean())
