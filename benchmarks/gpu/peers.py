"""What others do for the same, by their papers and published code, on the same device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.steps import RATIO, Model

_ROWS = 3
_LARGEST_CLASSIC = 200_000_000
"""Coordinates; a classic sketch's buckets and signs take 12 bytes for each and row."""
_SAMPLED = 0.01


def time_topk(bench: Bench, d: int) -> None:
    """The k largest of a vector by PyTorch, and by DGC's threshold of a sample."""
    vector, k = bench.gradient(d), int(d / RATIO)
    bench.time("topk", "torch.topk", d, lambda: torch.topk(vector.abs(), k, sorted=False), k=k)
    bench.time("topk", "torch.sort", d, lambda: torch.sort(vector.abs(), descending=True).indices[:k], k=k)
    bench.time("topk", "DGC", d, lambda: _sampled_threshold(vector, k), k=k)


def _sampled_threshold(vector: Tensor, k: int) -> Tensor:
    """Deep Gradient Compression's choice: the threshold of a sample, loosened or tightened up to ten times."""
    magnitudes = vector.abs()
    stride = int(1 / _SAMPLED)
    threshold = magnitudes[::stride].topk(max(1, k // stride), sorted=False).values.min()
    chosen = (magnitudes >= threshold).nonzero().view(-1)
    for _ in range(10):
        if chosen.numel() > 1.3 * k:
            return chosen[magnitudes[chosen].topk(k, sorted=False).indices]
        if chosen.numel() >= 0.8 * k:
            break
        threshold = threshold * 0.8
        chosen = (magnitudes >= threshold).nonzero().view(-1)
    return chosen


def time_classic(bench: Bench, d: int) -> None:
    """A Count Sketch of looked-up buckets and signs, and a choice from the estimates of everything: csvec's way."""
    cols, k = int(1.5 * d / RATIO / _ROWS), int(0.5 * d / RATIO)
    if d > _LARGEST_CLASSIC:
        return
    vector = bench.gradient(d)
    buckets = torch.randint(cols, (_ROWS, d), device=bench.device)
    signs = 2.0 * torch.randint(2, (_ROWS, d), device=bench.device, dtype=torch.float32) - 1.0
    table = torch.zeros(_ROWS, cols, device=bench.device)

    def add() -> None:
        for row, bucket, sign in zip(table, buckets, signs, strict=True):
            row += torch.bincount(bucket, weights=sign * vector, minlength=cols)

    def top_k() -> Tensor:
        estimates = torch.stack([row[bucket] * sign for row, bucket, sign in zip(table, buckets, signs, strict=True)])
        return torch.topk(estimates.median(dim=0).values.square_(), k, sorted=False).indices

    bench.time("add", "classic, bincount", d, add, rows=_ROWS, cols=cols)
    bench.time("top_k", "classic, of all estimates", d, top_k, rows=_ROWS, cols=cols, k=k)


class _Sum(nn.Module):
    """A model whose gradients cost nearly nothing to compute."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameter.detach() for parameter in parameters.values())

    def forward(self) -> Tensor:
        total: Tensor = torch.stack([parameter.view(-1)[0] for parameter in self.all]).sum()
        return total


def time_hooks(bench: Bench, d: int) -> None:
    """A backward pass under PyTorch's own data parallelism of one rank, with its communication hooks."""
    with _one_rank(bench.device):
        for impl, state, hook in _hooks(bench.device):
            model = _Sum(Model(bench, d).parameters)
            module = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            if hook is not None:
                module.register_comm_hook(state, hook)

            def backward(module: nn.Module = module) -> None:
                module().backward()

            try:
                for _ in range(3):  # buckets are laid out anew after the first, PowerSGD begins with the third
                    backward()
                bench.time("backward", impl, d, backward)
            except Exception as error:
                bench.fail("backward", impl, d, error)
            del model, module
            bench.free()


def _hooks(device: torch.device) -> Iterator[tuple[str, Any, Callable[..., Any] | None]]:
    yield "ddp", None, None
    if device.type == "cuda":
        yield "ddp, bf16 hook", None, default_hooks.bf16_compress_hook
    state = powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    yield "ddp, PowerSGD hook", state, powerSGD_hook.powerSGD_hook


@contextmanager
def _one_rank(device: torch.device) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


PEERS: tuple[Callable[[Bench, int], None], ...] = (time_topk, time_classic, time_hooks)
