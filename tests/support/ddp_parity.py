"""Scripts that end alike with DistributedDataParallel's own averages and with a hook that sends everything.

They are of the kinds that PyTorch tests its own hooks with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hvd_sketch as hvd
from hvd_sketch import Compression
from tests.support.ddp import PLAIN, SIZE, STEPS, sgd, step, wrapped
from tests.support.training import flat, loss, net

Register = Callable[[nn.Module, torch.optim.Optimizer], Any]


class Deep(nn.Module):
    """A net with a hidden layer more, of another type or tied to the first one's transpose, or recomputed."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, recomputes: bool = False, ties: bool = False) -> None:
        super().__init__()
        self.around, self.dtype, self.recomputes = net(), dtype, recomputes
        self.inside = nn.Linear(60, 60, dtype=dtype)
        with torch.no_grad():
            self.inside.weight.copy_(torch.eye(60))
            self.inside.bias.zero_()
        self.back = nn.Linear(60, 60, bias=False)
        self.back.weight = self.inside.weight if ties else nn.Parameter(torch.eye(60))

    def hidden(self, values: Tensor) -> Tensor:
        result: Tensor = self.back(self.inside(values.to(self.dtype)).tanh().float())
        return result

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.around[1](self.around[0](inputs))
        hidden = checkpoint(self.hidden, values, use_reentrant=False) if self.recomputes else self.hidden(values)
        result: Tensor = self.around[2](hidden)
        return result


def _of_one(register: Register, inner: nn.Module, **settings: Any) -> Tensor:
    model = wrapped(inner, **settings)
    optimizer = sgd(model, momentum=0.5)
    register(model, optimizer)
    for number in range(STEPS):
        step(model, optimizer, number)
    return flat(inner).float()


def of_a_group(register: Register) -> Tensor:
    """The ranks of the model's own process group, in another order."""
    return _of_one(register, net(), process_group=dist.new_group(list(reversed(range(SIZE)))))


def freezing(register: Register) -> Tensor:
    """A layer that trains in the middle of the training alone."""
    inner = net()
    model = wrapped(inner, find_unused_parameters=True)
    optimizer = sgd(model, momentum=0.5)
    register(model, optimizer)
    for number in range(STEPS):
        inner[0].requires_grad_(2 <= number < 4)
        step(model, optimizer, number)
    return flat(inner)


def adversaries(register: Register) -> Tensor:
    """Two models, each with its optimizer, of which one is trained through the other."""
    models = [wrapped(net(seed)) for seed in range(2)]
    optimizers = [sgd(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        register(model, optimizer)
    (generator, critic), generates = models, torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        made = generator(torch.randn(8, 30, generator=generates))[:, :30]
        critic.zero_grad()
        critic(torch.randn(8, 30, generator=generates)).mean().backward()
        critic(made.detach()).square().mean().backward()
        optimizers[1].step()
        generator.zero_grad()
        critic(made).mean().backward()
        optimizers[0].step()
    return torch.cat([flat(model) for model in models])


def two_losses(register: Register) -> Tensor:
    """One graph that is differentiated twice, and a derivative by the inputs in the loss."""
    model = wrapped(net())
    optimizer = sgd(model)
    register(model, optimizer)
    for number in range(STEPS):
        optimizer.zero_grad()
        inputs = torch.full((4, 30), 0.1 * number + dist.get_rank(), requires_grad=True)
        outputs = model(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        with model.no_sync():
            outputs.square().mean().backward(retain_graph=True)
        (loss(model, dist.get_rank(), number) + slope.square().mean()).backward()
        optimizer.step()
    return flat(model)


KINDS: dict[str, Callable[[Register], Tensor]] = {
    "several dtypes": lambda register: _of_one(register, Deep(torch.float64)),
    "half precision beside float32": lambda register: _of_one(register, Deep(torch.bfloat16)),
    "recomputed activations": lambda register: _of_one(register, Deep(recomputes=True)),
    "shared weights": lambda register: _of_one(register, Deep(ties=True)),
    "a group of its own": of_a_group,
    "a bucket for each parameter": lambda register: _of_one(register, net(), bucket_cap_mb=1e-6),
    "freezing": freezing,
    "adversaries": adversaries,
    "two losses": two_losses,
}


def _registers(ratio: float) -> Register:
    settings = {**PLAIN, "ratio": ratio}
    return lambda model, optimizer: hvd.ddp.register(model, optimizer, Compression.topk(**settings))


def ends(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of DistributedDataParallel alone, of all sent, and of an eighth of it."""
    train = KINDS[kind]
    return train(lambda model, optimizer: None), train(_registers(1.0)), train(_registers(8.0))
