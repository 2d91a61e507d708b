"""Scripts whose gradients are given and not computed, so that they end with the same bits on every device.

Each is run on launched ranks, where the parameters live on a device and DistributedDataParallel may wrap the model,
and on simulated ranks of the processor, where `DistributedOptimizer` trains it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hvd_sketch as hvd
from hvd_sketch import Compression
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.torch import TorchCommunicator
from hvd_sketch.compressors import Compressor
from hvd_sketch.exchange import Exchange, HierarchicalExchange
from tests.support.compressors import SHARDED, TABLE, TOPK, TOTAL
from tests.support.simulation import SHAPES, heavy_tailed

STEPS, RATE, FAR = 4, 0.125, 0.05  # a rate of a power of two: no product with it is rounded


class Given(nn.Module):
    """f(g) = sum_i <p_i, g_i>, whose gradient is g to the bit."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name.replace(".", "_"): torch.ones(shape) for name, shape in SHAPES.items()})

    def forward(self, gradient: Tensor) -> Tensor:
        parameters = list(self.parameters())
        parts = gradient.split([parameter.numel() for parameter in parameters])
        products = [(p * part.view(p.shape)).sum() for p, part in zip(parameters, parts, strict=True)]
        return torch.stack(products).sum()


@dataclass
class Place:
    """Where one rank trains.

    Attributes:
        device: of the parameters.
        rank: its number.
        comm: of simulated ranks; launched ones have the default process group.
    """

    device: torch.device
    rank: int
    comm: Communicator | None = None


class End(NamedTuple):
    """What a rank holds after training, parameters and what is unsent in the same order, and what it has sent."""

    parameters: Tensor
    kept: Tensor
    bytes_sent: int
    steps: int


Case = Callable[[Place], End]


def gradients_of(rank: int, passes: int = 1, *, spoiled: bool = False) -> Tensor:
    """Shape (steps, passes, total). If spoiled, a number of rank 0's third step is none."""
    gradients = heavy_tailed(STEPS, passes, TOTAL, seed=rank)
    if spoiled and rank == 0:
        gradients[2, 0, 77] = torch.nan
    return gradients


def kept_of(model: nn.Module, exchange: Exchange) -> Tensor:
    """What is unsent on this rank, in the order of the parameters; of a host's memory its part as it is."""
    if isinstance(exchange, HierarchicalExchange):
        return exchange.part.memory.residual
    memory = exchange.in_model(exchange.memory.residual)
    parts = {slot.name: memory[slot.offset : slot.stop] for slot in exchange.layout.slots}
    return torch.cat([parts[name.removeprefix("module.")] for name, _ in model.named_parameters()])


def train(model: Any, optimizer: Any, gradients: Tensor) -> None:
    """All passes of a step but the last one are inside of ``no_sync``, where there is such a thing."""
    device = next(model.parameters()).device
    for passes in gradients.to(device):
        optimizer.zero_grad()
        for number, gradient in enumerate(passes):
            last = number == len(passes) - 1 or not isinstance(model, DistributedDataParallel)
            with nullcontext() if last else model.no_sync():
                model(gradient).backward()
        optimizer.step()


def end_of(model: nn.Module, exchange: Exchange) -> End:
    parameters = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return End(parameters.clone(), kept_of(model, exchange), exchange.stats.bytes_sent, exchange.stats.steps)


def distributed(place: Place, compressor: Compressor, *, far: bool = False, **settings: Any) -> tuple[nn.Module, Any]:
    """A model and its `DistributedOptimizer`, where messages take long if ``far``."""
    comm = place.comm
    if far:
        comm = comm or TorchCommunicator()
        comm.crossing = FAR
    model = Given().to(place.device)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    compressor = replace(compressor, anticipate=False)
    return model, hvd.DistributedOptimizer(optimizer, model.named_parameters(), compressor, comm=comm, **settings)


def hooked(place: Place, compressor: Compressor, **wrapping: Any) -> tuple[Any, Any, Any]:
    """A model, its optimizer, and who exchanges: the hook, or the optimizer itself on simulated ranks."""
    if place.comm is not None:
        model, optimizer = distributed(place, compressor)
        return model, optimizer, optimizer
    wrapped = DistributedDataParallel(Given().to(place.device), **wrapping)
    plain = torch.optim.SGD(wrapped.parameters(), RATE)
    return wrapped, plain, hvd.ddp.register(wrapped, plain, replace(compressor, anticipate=False))


def by_optimizer(
    place: Place, compressor: Compressor, *, passes: int = 1, spoiled: bool = False, **settings: Any
) -> End:
    model, optimizer = distributed(place, compressor, **settings)
    train(model, optimizer, gradients_of(place.rank, passes, spoiled=spoiled))
    return end_of(model, optimizer.exchange)


def by_hook(place: Place, compressor: Compressor, *, passes: int = 1, spoiled: bool = False, **wrapping: Any) -> End:
    model, optimizer, holder = hooked(place, compressor, **wrapping)
    train(model, optimizer, gradients_of(place.rank, passes, spoiled=spoiled))
    return end_of(model, holder.exchange)


def resumed(place: Place) -> End:
    """Saved after two steps, and loaded into another model by way of a file that is read on the processor."""
    gradients, file = gradients_of(place.rank), io.BytesIO()
    model, optimizer, holder = hooked(place, SHARDED)
    train(model, optimizer, gradients[:2])
    torch.save({"model": model.state_dict(), "memory": holder.memory_state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=False)
    model, optimizer, holder = hooked(place, SHARDED)
    model.load_state_dict(saved["model"])
    holder.load_memory_state_dict(saved["memory"])
    train(model, optimizer, gradients[2:])
    return end_of(model, holder.exchange)


WRAPPINGS: Mapping[str, dict[str, Any]] = {
    "views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.004},
    "static graph": {"static_graph": True},
    "unused looked for": {"find_unused_parameters": True},
}
HOOK: dict[str, Case] = {
    **{name: partial(by_hook, compressor=each) for name, each in TABLE.items()},
    **{kind: partial(by_hook, compressor=SHARDED, **settings) for kind, settings in WRAPPINGS.items()},
    "mixed by Hadamard": partial(by_hook, compressor=replace(SHARDED, mixing="hadamard")),
    "mixed by cosines": partial(by_hook, compressor=replace(TOPK, mixing="dct")),
    "accumulated": partial(by_hook, compressor=TOPK, passes=2),
    "void": partial(by_hook, compressor=SHARDED, spoiled=True),
    "resumed": resumed,
}
"""Of the communication hook, on any number of ranks."""
OPTIMIZER: dict[str, Case] = {
    **{
        f"optimizer, {name}": partial(by_optimizer, compressor=TABLE[name])
        for name in ("sharded", "sketch, half", "topk", "stride", "powersgd")
    },
    **{
        f"direct, {name}": partial(by_optimizer, compressor=TABLE[name], far=True)
        for name in ("sharded", "sketch", "topk", "stride", "powersgd")
    },
    **{
        f"host, {name}": partial(by_optimizer, compressor=TABLE[name], hierarchical=True)
        for name in ("sharded", "sketch, half", "topk")
    },
    "optimizer, mixed by Hadamard": partial(by_optimizer, compressor=replace(TOPK, mixing="hadamard")),
    "optimizer, mixed by cosines": partial(by_optimizer, compressor=Compression.mixed(ratio=10.0, warmup_steps=0)),
    "optimizer, void": partial(by_optimizer, compressor=TOPK, spoiled=True),
}
"""Of `DistributedOptimizer`, on several ranks."""
EVERY: dict[str, Case] = {**HOOK, **OPTIMIZER}
ROUNDED = [name for name in EVERY if "powersgd" in name or "cosines" in name]
"""Those with matrix products, whose order of sums is left open."""
FORGETFUL = (
    *(name for name in EVERY if name.startswith("host")),
    "void",
    "accumulated",
    "optimizer, void",
    "optimizer, mixed by cosines",
)
"""Those that leave some of the gradients out, take more of them, let the memory decay, or have it at a host."""
