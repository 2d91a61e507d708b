"""What a step is made of, each by itself, on one vector of d coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.ranks import Alike
from benchmarks.gpu.steps import RATIO, SPARSE, Model
from hvd_sketch.error_feedback.factored_moments import FactoredMoments, MomentsObserver
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.common_share import CommonShare
from hvd_sketch.exchange.staging import Staging
from hvd_sketch.layout import Layout
from hvd_sketch.sketch import CountSketch
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.codec import SparseCodec
from hvd_sketch.sparse.heaviest import heaviest_of_shards

ROWS = 3


def time_sketch(bench: Bench, d: int) -> None:
    """Adding, advancing and choosing, at the sizes of ``Compression.sketch`` at the ratio."""
    vector, memory = bench.gradient(d), bench.gradient(d, 1)
    cols, k = int(1.5 * d / RATIO / ROWS), int(0.5 * d / RATIO)
    sketch = CountSketch(d, ROWS, cols, seed=1, device=bench.device)
    shape = {"rows": ROWS, "cols": cols, "k": k}
    bench.time("add", "hvd_sketch", d, lambda: sketch.add(vector, scale=0.5), **shape)
    sketch.reset(1)
    sketch.add(vector)
    bench.time("top_k", "hvd_sketch", d, lambda: sketch.top_k(k), **shape)
    chosen = Chosen(sketch.top_k(k)[0], slice(0))
    left = torch.zeros(k, device=bench.device)
    bench.time("advance", "hvd_sketch", d, lambda: sketch.add_advanced(memory, vector, 0.5, chosen, left), **shape)
    sketch.reset(1)
    bench.time("top_k", "hvd_sketch, of zeros", d, lambda: sketch.top_k(k), **shape)


def time_lists(bench: Bench, d: int) -> None:
    """Choosing from the memory itself, of one shard and of as many as there are ranks, and the code for the latter."""
    vector, count = bench.gradient(d), int(3 * d / RATIO)
    bench.time("heaviest", "hvd_sketch, 1 shard", d, lambda: heaviest_of_shards(vector, 1, count), k=count)
    shards = Alike.size
    each = count // shards
    impl = f"hvd_sketch, {shards} shards"
    bench.time("heaviest", impl, d, lambda: heaviest_of_shards(vector, shards, each), k=count)
    rows, values = heaviest_of_shards(vector, shards, each)
    codec = SparseCodec(-(-d // shards), each)
    code, _ = codec.encode(rows, values)
    bench.time("encode", impl, d, lambda: codec.encode(rows, values), k=count)
    bench.time("decode", impl, d, lambda: codec.decode(code), k=count)


def time_staging(bench: Bench, d: int) -> None:
    """Gradients of a model to their places, with the norm."""
    model = Model(bench, d)
    layout = Layout.of(model.parameters.items(), lambda name, parameter: False)
    index = layout.index()
    for dtype in (torch.float32, torch.bfloat16):
        staging = Staging(layout, bench.device)
        gradients = {
            index[name]: parameter.grad.to(dtype)
            for name, parameter in model.parameters.items()
            if parameter.grad is not None
        }

        def stage(staging: Staging = staging, gradients: dict[int, Tensor] = gradients) -> float:
            staging.put_many(gradients, 1.0)
            return staging.norm()

        bench.time("stage", f"hvd_sketch, {str(dtype).removeprefix('torch.')}", model.numel, stage)


def time_observers(bench: Bench, d: int) -> None:
    """What `Anticipate` measures after a step."""
    model = Model(bench, d)
    layout = SPARSE["sharded"].layout(model.parameters.items())
    observers: dict[str, Any] = {
        "common_share": CommonShare(),
        "moments": MomentsObserver(FactoredMoments(interval=1), model.parameters.items()),
    }
    for op, observer in observers.items():
        exchange = SPARSE["sharded"].exchange(layout, Alike(), average=True, device=bench.device)
        exchange.memory.residual.copy_(bench.gradient(layout.total, 1))
        exchange.gradient.copy_(bench.gradient(layout.total))
        observer.attach(exchange)
        bench.time(op, "hvd_sketch", model.numel, _observing(observer, exchange))


def _observing(observer: Any, exchange: Exchange) -> Callable[[], None]:
    """Observe as after the first step, when everything is measured."""
    fresh = observer.state_dict()

    def observe() -> None:
        observer.load_state_dict(fresh)
        observer.observe(exchange)

    return observe


PARTS: tuple[Callable[[Bench, int], None], ...] = (time_sketch, time_lists, time_observers, time_staging)
