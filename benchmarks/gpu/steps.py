"""Whole steps: all gradients of a transformer in, the same update in their places, the network left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.ranks import Alike
from hvd_sketch import Anticipate, Compression, DistributedOptimizer, FactoredMoments
from hvd_sketch.exchange import DenseExchange, Exchange
from hvd_sketch.layout import Layout

RATIO = 40.0
_PLAIN: dict[str, Any] = {"ratio": RATIO, "warmup_steps": 0}
SPARSE: dict[str, Any] = {
    "sketch": Compression.sketch(**_PLAIN),
    "sketch, in turn": Compression.sketch(**_PLAIN, in_turn=0.75),
    "sharded": Compression.sharded(**_PLAIN),
    "topk": Compression.topk(**_PLAIN),
    "sharded, mixed by dct": Compression.sharded(**_PLAIN, mixing="dct"),
    "sharded, mixed by hadamard": Compression.sharded(**_PLAIN, mixing="hadamard"),
    "stride": Compression.stride(**_PLAIN),
    "powersgd": Compression.powersgd(rank=4, start_step=0),
}
AHEAD: dict[str, tuple[Any, Anticipate]] = {
    "sharded, anticipate": (SPARSE["sharded"], Anticipate()),
    "sharded, anticipate, factored": (SPARSE["sharded"], Anticipate(second_moments=FactoredMoments())),
}


def shapes(d: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a transformer's layers, about d in all, as wide as models of that size are."""
    width = next(width for width in (2048, 1024, 512, 128, 64, 32) if 36 * width**2 <= d)
    layer: dict[str, tuple[int, ...]] = {
        "mix.weight": (3 * width, width),
        "mix.bias": (3 * width,),
        "out.weight": (width, width),
        "out.bias": (width,),
        "up.weight": (4 * width, width),
        "up.bias": (4 * width,),
        "down.weight": (width, 4 * width),
        "down.bias": (width,),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
    }
    layers = round(d / (12 * width**2))
    return {f"layers.{number:02d}.{name}": shape for number in range(layers) for name, shape in layer.items()}


class Model:
    """Parameters with gradients in place, bfloat16 or float32."""

    def __init__(self, bench: Bench, d: int) -> None:
        named = shapes(d)
        self.numel = sum(torch.Size(shape).numel() for shape in named.values())
        sizes = [torch.Size(shape).numel() for shape in named.values()]
        flat = bench.gradient(self.numel)
        self.parameters = {name: torch.zeros(shape, device=bench.device) for name, shape in named.items()}
        for parameter, part in zip(self.parameters.values(), flat.split(sizes), strict=True):
            parameter.requires_grad_()
            parameter.grad = part.view(parameter.shape)

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients, in the parameters' order."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]


def _dense(model: Model, device: torch.device) -> Exchange:
    layout = Layout.of(model.parameters.items(), lambda name, parameter: False)
    return DenseExchange(layout, Alike(), average=True, device=device)


def _sparse(compressor: Any) -> Callable[[Model, torch.device], Exchange]:
    def make(model: Model, device: torch.device) -> Exchange:
        layout = compressor.layout(model.parameters.items())
        exchange: Exchange = compressor.exchange(layout, Alike(), average=True, device=device)
        return exchange

    return make


def _timed(impl: str, make: Callable[[Model, torch.device], Exchange]) -> Callable[[Bench, int], None]:
    """Time a compressor's exchange, as the optimizer's hooks and its step call it."""

    def time_step(bench: Bench, d: int) -> None:
        model = Model(bench, d)
        step = _step(model, make(model, bench.device))
        bench.time("step", impl, model.numel, step, ranks=Alike.size, ratio=RATIO)

    time_step.__name__ = f"step, {impl}"
    return time_step


STEPS = [*(_timed(impl, _sparse(compressor)) for impl, compressor in SPARSE.items()), _timed("dense", _dense)]


def _step(model: Model, exchange: Exchange) -> Callable[[], None]:
    index = exchange.layout.index()
    places = {index[name]: parameter.grad for name, parameter in model.parameters.items()}
    gradients = {position: gradient.clone() for position, gradient in places.items() if gradient is not None}
    updates = {position: gradient for position, gradient in places.items() if gradient is not None}

    def step() -> None:
        exchange.submit_many(gradients)
        exchange.run()
        exchange.write_update(updates)

    return step


def time_optimizers(bench: Bench, d: int) -> None:
    """Adam's step by itself, and with the exchange and error feedback around it."""
    model = Model(bench, d)
    adam = torch.optim.AdamW(model.parameters.values(), lr=1e-4)
    bench.time("optimizer", "adamw", model.numel, adam.step)
    del model, adam
    for impl, (compressor, feedback) in AHEAD.items():
        bench.free()
        try:
            _time_ahead(bench, impl, Model(bench, d), compressor, feedback)
        except Exception as error:
            bench.fail("optimizer", impl, d, error)


def _time_ahead(bench: Bench, impl: str, model: Model, compressor: Any, feedback: Anticipate) -> None:
    """The block of a step ahead by itself, with nearly no backward in it, and the step after it."""
    adam = torch.optim.AdamW(model.parameters.values(), lr=1e-4)
    optimizer: Any = DistributedOptimizer(
        adam, model.parameters.items(), compressor, comm=Alike(), error_feedback=feedback
    )
    smallest = min(model.parameters.values(), key=Tensor.numel)
    gradients = [gradient.clone() for gradient in model.gradients]

    def block() -> None:
        with optimizer.step_ahead():
            smallest.sum().backward()
        optimizer.set_backward_passes_per_step(1)

    def step() -> None:
        for parameter, gradient in zip(model.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        with optimizer.step_ahead():
            smallest.sum().backward()
        optimizer.step()

    bench.time("optimizer", impl, model.numel, step, ranks=Alike.size, ratio=RATIO)
    bench.time("ahead", impl, model.numel, block)
