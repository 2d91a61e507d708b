"""The parameters that an optimizer trains, as vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.shards import local

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
    """Parameters of a layout, and vectors of that order; float64 if any parameter is, else float32.

    Between a GPU's parameters and vectors of the host one copy is made through pinned memory, in place of one a
    parameter; a vector beside the parameters is kept for it.
    """

    def __init__(self, named: Mapping[str, Tensor], layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.parameters = [named[slot.name] for slot in layout.slots]
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        self.dtype = torch.float64 if double else torch.float32

    @property
    def _values(self) -> list[Tensor]:
        """The parameters' memory, whatever a script has put there, beside autograd and its count of versions."""
        values = [local(parameter).data for parameter in self.parameters]
        for slot, value in zip(self.layout.slots, values, strict=True):
            if value.shape != slot.shape:
                raise ConfigurationError(
                    f"parameter {slot.name!r} has the shape {tuple(value.shape)}, and had {slot.shape} when the "
                    "optimizer was wrapped; wrap the plain optimizer again after changing a model"
                )
        return values

    @cached_property
    def _elsewhere(self) -> torch.device | None:
        """Where all parameters are, if that is not where the vectors are."""
        devices = {parameter.device for parameter in self.parameters}
        return devices.pop() if len(devices) == 1 and devices != {self.device} else None

    def new(self) -> Flat:
        """A vector of zeros."""
        return self._flat(self.device, pinned=self._elsewhere is not None and self._elsewhere.type == "cuda")

    def read(self, into: Flat) -> None:
        """Copy the parameters into a vector."""
        torch._foreach_copy_(self._beside(into).views, self._values)
        self._cross(self._beside(into), into)

    def write(self, values: Flat) -> None:
        """Copy a vector into the parameters."""
        self._cross(values, self._beside(values))
        torch._foreach_copy_(self._values, self._beside(values).views)

    def read_gradients(self, into: Flat) -> None:
        """Copy the gradients into a vector; a parameter without one counts as gradient zero."""
        for view, parameter in zip(self._beside(into).views, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        self._cross(self._beside(into), into)

    def write_gradients(self, values: Flat) -> None:
        """Copy a vector into the gradients, made where there are none."""
        self._cross(values, self._beside(values))
        for view, parameter in zip(self._beside(values).views, self.parameters, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(view)

    @cached_property
    def _crossing(self) -> Flat:
        """A vector where the parameters are."""
        return self._flat(self._elsewhere or self.device)

    def _beside(self, vector: Flat) -> Flat:
        """What the parameters are copied from or to in place of this vector, perhaps itself."""
        return vector if self._elsewhere is None else self._crossing

    @staticmethod
    def _cross(source: Flat, target: Flat) -> None:
        if source is not target:
            target.vector.copy_(source.vector)

    def _flat(self, device: torch.device, *, pinned: bool = False) -> Flat:
        vector = torch.zeros(self.layout.total, dtype=self.dtype, device=device, pin_memory=pinned)
        return Flat.of(vector, [slot.shape for slot in self.layout.slots])


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
