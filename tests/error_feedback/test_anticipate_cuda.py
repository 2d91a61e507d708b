"""The kernel moves parameters to where PyTorch's own operations do: interpreted, compiled, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import Anticipate, Compression, DistributedOptimizer, gpu
from hvd_sketch.comm import SingleProcess
from tests.support.triton import (
    INSTALLED,
    INTERPRETED,
    on_interpreter,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adam, maximize": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, eps=1e-3, maximize=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.1),
}


class OneOfThree(SingleProcess):
    """Owns a third, as one of three ranks that all send the same."""

    rank, size = 1, 3

    def post_allreduce(self, tensor: Tensor, name: str) -> Any:
        return super().post_allreduce(tensor.mul_(3), name)

    def post_allgather(self, tensor: Tensor, name: str) -> Any:
        return super().post_allgather(tensor, name).__class__(tensor.expand(3, -1).clone())

    def post_alltoall(self, tensor: Tensor, name: str) -> Any:
        return super().post_alltoall(tensor[1].expand_as(tensor), name)


def points(make: Callable[..., torch.optim.Optimizer], device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """The parameters of a model where the gradient was taken, and after each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).to(device, dtype)
    inputs = torch.randn(16, 30).to(device, dtype)
    compressor = Compression.sharded(ratio=6.0, warmup_steps=0)
    optimizer: Any = DistributedOptimizer(
        make(model.parameters()), model.named_parameters(), compressor, comm=OneOfThree(), error_feedback=Anticipate()
    )
    seen = []
    for _ in range(5):
        optimizer.zero_grad()
        with optimizer.step_ahead():
            seen.append([parameter.detach().float().cpu().clone() for parameter in model.parameters()])
            nn.functional.mse_loss(model(inputs), inputs[:, :3]).backward()
        seen.append([parameter.detach().float().cpu().clone() for parameter in model.parameters()])
        optimizer.step()
    return seen


def served_by(serves: Callable[[Tensor], bool], *arguments: Any) -> list[list[Tensor]]:
    from hvd_sketch.error_feedback import anticipate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anticipate, "gpu", SimpleNamespace(serves=serves))
        return points(*arguments)


def check(device: torch.device, serves: Callable[[Tensor], bool]) -> None:
    for name, make in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            ours, expected = (served_by(each, make, device, dtype) for each in (serves, lambda tensor: False))
            alike = 10 if dtype == torch.float32 else 4  # then another choice has followed from a rounding
            for one, other in zip(ours[:alike], expected[:alike], strict=True):
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=f"{name} {dtype}")


@on_interpreter
def test_the_kernel_moves_where_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_sketch.error_feedback import anticipate_cuda

    monkeypatch.setattr(anticipate_cuda, "_PIECE", 1024)
    check(torch.device("cpu"), lambda tensor: True)


@pytest.mark.skipif(INTERPRETED or not INSTALLED or not torch.cuda.is_available(), reason="needs a GPU and Triton")
def test_on_a_gpu() -> None:
    check(torch.device("cuda"), gpu.serves)


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """All of them, with the types of their arguments other than int64 and their constants."""
    import triton.language as tl  # type: ignore[import-untyped]

    from hvd_sketch.error_feedback import anticipate_cuda

    pointers = dict.fromkeys(("parameters", "moments", "pieces"), "*i64")
    pointers |= dict.fromkeys(("errors", "shares", "numbers", "kept"), "*fp32")
    for kind in (tl.float32, tl.float16, tl.bfloat16):
        yield anticipate_cuda.move, pointers, {"kind": kind, "piece": 1 << 14, "lanes": 1024}
