"""Parameters as vectors, of their device or through one copy from another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch.methods.flat import HOST, FlatParameters, whole


@pytest.fixture(params=[False, True], ids=["beside", "crossing"])
def flat(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FlatParameters:
    """In the second case the way is that of parameters on another device, without one."""
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in {"a": (3, 4), "b": (5,), "c": ()}.items()}
    flat = FlatParameters(parameters, whole(parameters.items()), HOST)
    if request.param:
        monkeypatch.setattr(flat, "_elsewhere", HOST)
    return flat


def together(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_parameters_are_read_and_written(flat: FlatParameters) -> None:
    vector, before = flat.new(), together(flat.parameters)
    flat.read(vector)
    assert torch.equal(vector.vector, before)
    vector.vector.mul_(2.0)
    assert torch.equal(together(flat.parameters), before)
    flat.write(vector)
    assert torch.equal(together(flat.parameters), 2.0 * before)
    assert torch.equal(vector.vector, 2.0 * before)


def test_gradients_are_read_and_written(flat: FlatParameters) -> None:
    vector = flat.new()
    vector.vector.fill_(7.0)
    first, *others = flat.parameters
    for parameter in others:
        parameter.grad = torch.full_like(parameter, 3.0)
    flat.read_gradients(vector)
    assert vector.vector.count_nonzero() == vector.vector.numel() - first.numel()
    flat.write_gradients(vector)
    assert torch.equal(together([p.grad for p in flat.parameters if p.grad is not None]), vector.vector)
