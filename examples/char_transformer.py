"""Train a small character-level transformer on the sources of the Python standard library.

    mpirun -np 2 --bind-to none python examples/char_transformer.py --compression sharded --ratio 40
    horovodrun -np 2 python examples/char_transformer.py --compression sketch --ratio 20 --plot curves.png
    python examples/char_transformer.py

Each rank reads its own share of the files. Every tenth file is kept for validation.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_sketch as hvd

CONTEXT = 64  # characters the model sees
ALPHABET = bytes([*range(32, 127), *b"\n\t"])  # anything else is one more symbol
SYMBOLS = len(ALPHABET) + 1
LR_WARMUP = 20  # steps
VALIDATION_WINDOWS = 256


class CharTransformer(nn.Module):
    """A decoder-only transformer with learned positions; 0.6 million parameters at the default sizes."""

    def __init__(self, width: int = 128, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, SYMBOLS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Scores of the next symbol: text (batch, CONTEXT) of int64, result (batch, CONTEXT, SYMBOLS)."""
        hidden = self.symbols(text) + self.positions
        for block in self.blocks:
            hidden = block(hidden, self.mask, is_causal=True)
        scores: Tensor = self.head(self.norm(hidden))
        return scores


def train(options: argparse.Namespace) -> harness.Record:
    """Train on all ranks; this is an ordinary Horovod script but for the name of the module."""
    training_files, validation_files = source_files()
    training = encode(training_files[hvd.rank() :: hvd.size()])
    validation = encode(validation_files)

    torch.manual_seed(options.seed)
    model = CharTransformer()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=harness.compression_of(options),
    )

    run = harness.Run(options, model, optimizer, lambda: evaluate(model, validation), "validation loss")
    for step in run.steps():
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / LR_WARMUP)
        text, following = random_windows(training, options.batch_size, options.seed, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(text).flatten(0, 1), following.flatten())
        loss.backward()
        optimizer.step()
    return run.record


@torch.no_grad()
def evaluate(model: nn.Module, validation: Tensor) -> float:
    """The mean loss in nats per character, over windows that all ranks share out among themselves."""
    starts = torch.linspace(0, len(validation) - CONTEXT - 1, VALIDATION_WINDOWS).long()
    text, following = windows(validation, starts[hvd.rank() :: hvd.size()])
    model.eval()
    loss = F.cross_entropy(model(text).flatten(0, 1), following.flatten(), reduction="sum")
    model.train()
    return harness.mean_over_ranks(float(loss), following.numel())


def random_windows(text: Tensor, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """This rank's batch of a step: drawn from seed, step and rank alone, so that a resumed run goes on alike."""
    generator = torch.Generator().manual_seed(seed * 10_000_019 + step * hvd.size() + hvd.rank())
    return windows(text, torch.randint(len(text) - CONTEXT, (count,), generator=generator))


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """CONTEXT characters from each start on, and for each of them the following one."""
    rows = text.unfold(0, CONTEXT + 1, 1)[starts].long()
    return rows[:, :-1], rows[:, 1:]


def source_files() -> tuple[list[Path], list[Path]]:
    """The standard library's top-level modules, in the order of their names: (training, validation)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    validation = files[::10]
    return [file for file in files if file not in validation], validation


def encode(files: list[Path]) -> Tensor:
    """The files' bytes, one behind the other, as uint8 numbers of symbols."""
    symbol_of = torch.full((256,), len(ALPHABET), dtype=torch.uint8)
    symbol_of[list(ALPHABET)] = torch.arange(len(ALPHABET), dtype=torch.uint8)
    text = bytearray(b"\n".join(file.read_bytes() for file in files))
    return symbol_of[torch.frombuffer(text, dtype=torch.uint8).long()]


if __name__ == "__main__":
    hvd.init()
    harness.compare(train, harness.parser(__doc__, steps=600, lr=0.3, batch_size=16).parse_args())
