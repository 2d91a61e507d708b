"""Train a small convolutional network on scikit-learn's handwritten digits.

    mpirun -np 2 --bind-to none python examples/digits_cnn.py --compression sketch --ratio 20 --plot curves.png
    horovodrun -np 2 python examples/digits_cnn.py --compression topk
    python examples/digits_cnn.py

The digits come with scikit-learn: 1797 images of 8 x 8 pixels, every fifth of them is kept for validation.
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hvd_sketch as hvd


class DigitsCNN(nn.Sequential):
    """Three convolutions with BatchNorm and two linear layers; 0.2 million parameters at the default width."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            *_convolution(1, width),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()


def train(options: argparse.Namespace) -> harness.Record:
    """Train on all ranks; this is an ordinary Horovod script but for the name of the module."""
    images, digits = load()
    validating = torch.arange(len(images)) % 5 == 0
    training_images, training_digits = (part[~validating][hvd.rank() :: hvd.size()] for part in (images, digits))

    torch.manual_seed(options.seed)
    model = DigitsCNN()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=harness.compression_of(options),
    )

    def validate() -> float:
        return accuracy(model, images[validating], digits[validating])

    run = harness.Run(options, model, optimizer, validate, "validation accuracy")
    for step in run.steps():
        chosen = sample(len(training_images), options.batch_size, options.seed, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(training_images[chosen]), training_digits[chosen])
        loss.backward()
        optimizer.step()
    return run.record


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, digits: Tensor) -> float:
    """The share of digits that are read correctly; all ranks share them out among themselves."""
    average_batch_norm(model)
    mine = slice(hvd.rank(), None, hvd.size())
    model.eval()
    correct = (model(images[mine]).argmax(1) == digits[mine]).sum()
    model.train()
    return harness.mean_over_ranks(float(correct), len(digits[mine]))


def average_batch_norm(model: nn.Module) -> None:
    """Make the running statistics, which each rank took of its own batches, the same on all ranks."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(hvd.allreduce(buffer, name=name))


def sample(population: int, count: int, seed: int, step: int) -> Tensor:
    """This rank's batch of a step: drawn from seed, step and rank alone, so that a resumed run goes on alike."""
    generator = torch.Generator().manual_seed(seed * 10_000_019 + step * hvd.size() + hvd.rank())
    return torch.randint(population, (count,), generator=generator)


def load() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8), float32 between 0 and 1, and their digits."""
    digits = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0, torch.from_numpy(digits.target)


if __name__ == "__main__":
    hvd.init()
    harness.compare(train, harness.parser(__doc__, steps=300, lr=0.02, batch_size=32).parse_args())
