"""The parameters that an optimizer trains, as vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout

HOST = torch.device("cpu")


class Flat(NamedTuple):
    """One vector, and the same memory as a list of views in the parameters' shapes."""

    vector: Tensor
    views: list[Tensor]

    @classmethod
    def of(cls, vector: Tensor, shapes: Sequence[Sequence[int]]) -> Flat:
        """Views of a vector, one behind the other."""
        parts = vector.split([math.prod(shape) for shape in shapes])
        return cls(vector, [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)])

    def __reduce__(self) -> Any:
        """Copies and pickles would not share the memory."""
        return Flat.of, (self.vector, [tuple(view.shape) for view in self.views])


LayoutRule = Callable[[Iterable[tuple[str, Tensor]]], Layout]
"""Lays out named parameters."""


def whole(named_parameters: Iterable[tuple[str, Tensor]]) -> Layout:
    """The layout where nothing is compressed: all parameters, ordered by name."""
    return Layout.of(named_parameters, lambda name, parameter: True)


class FlatParameters:
    """Parameters of a layout, and vectors of that order; float64 if any parameter is, else float32."""

    def __init__(self, named: Mapping[str, Tensor], layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.parameters = [named[slot.name] for slot in layout.slots]
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        self.dtype = torch.float64 if double else torch.float32

    @property
    def _values(self) -> list[Tensor]:
        """The parameters' memory, whatever a script has put there, beside autograd and its count of versions."""
        return [parameter.data for parameter in self.parameters]

    def new(self) -> Flat:
        """A vector of zeros."""
        vector = torch.zeros(self.layout.total, dtype=self.dtype, device=self.device)
        return Flat.of(vector, [slot.shape for slot in self.layout.slots])

    def read(self, into: Flat) -> None:
        """Copy the parameters into a vector."""
        torch._foreach_copy_(into.views, self._values)

    def write(self, values: Flat) -> None:
        """Copy a vector into the parameters."""
        torch._foreach_copy_(self._values, values.views)

    def read_gradients(self, into: Flat) -> None:
        """Copy the gradients into a vector; a parameter without one counts as gradient zero."""
        for view, parameter in zip(into.views, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)

    def write_gradients(self, values: Flat) -> None:
        """Copy a vector into the gradients, made where there are none."""
        for view, parameter in zip(values.views, self.parameters, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(view)


class FlatModel(FlatParameters):
    """What ``optimizer`` trains of ``model``, as vectors on a device, host memory unless another is given.

    Raises:
        ConfigurationError: when the optimizer trains parameters that are not the model's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        layout: LayoutRule = whole,
        device: torch.device = HOST,
    ) -> None:
        group_of = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for parameter in group_of.keys() - set(model.parameters()):
            raise ConfigurationError(
                f"parameter group {group_of[parameter]} of the optimizer holds parameters that are not the model's; "
                "they would never be averaged: pass the model that the optimizer trains"
            )
        named = {name: p for name, p in model.named_parameters() if p in group_of and p.requires_grad}
        super().__init__(named, layout(named.items()), device)
        self.groups: list[list[int]] = [[] for _ in optimizer.param_groups]
        for position, parameter in enumerate(self.parameters):
            self.groups[group_of[parameter]].append(position)
