"""What is served, and losses on trusted data at any model of the server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hvd_sketch.methods.flat import Flat, FlatParameters

Validate = Callable[[nn.Module, int], Tensor]
"""The loss of a model, a scalar that can be differentiated, on validation sample number n = 0, 1, …

It may draw a fresh sample for every number; for one number it must always be the same.
"""


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
        parameters: of ``model``, by the layout that all ranks share.
        model: for the server's own use; nobody trains it.
        samples: how many each worker has, by rank.
    """

    parameters: FlatParameters
    model: nn.Module
    samples: dict[int, int] = field(default_factory=dict)

    @property
    def workers(self) -> list[int]:
        """Ranks of the workers, ascending."""
        return sorted(self.samples)

    @classmethod
    def copy_of(cls, parameters: FlatParameters, model: nn.Module, samples: dict[int, int]) -> Served:
        """With a copy of the model, in host memory."""
        copied = copy.deepcopy(model).cpu()
        named = dict(copied.named_parameters())
        return cls(FlatParameters(named, parameters.layout, torch.device("cpu")), copied, samples)


class Validation:
    """A loss on trusted data, at flat models."""

    def __init__(self, validate: Validate, served: Served) -> None:
        self._validate, self._served = validate, served
        self._flat = served.parameters.new()

    def loss(self, model: Tensor, number: int) -> float:
        """The loss at a model on sample ``number``."""
        self._put(model)
        with torch.no_grad():
            return float(self._validate(self._served.model, number))

    def gradient(self, model: Tensor, number: int) -> Tensor:
        """The gradient at a model on sample ``number``: a new vector."""
        self._put(model)
        return self._gradient(number).vector

    def descent(self, model: Tensor, number: int, rate: float, steps: int) -> Tensor:
        """How far so many steps of SGD go, each on a sample of its own: the model less where they end."""
        here = model.clone()
        for step in range(steps):
            self._put(here)
            here.sub_(self._gradient(number * steps + step).vector, alpha=rate)
        return model - here

    def _gradient(self, number: int) -> Flat:
        self._served.model.zero_grad()
        with torch.enable_grad():
            torch.autograd.backward(self._validate(self._served.model, number))
        gradient = self._served.parameters.new()
        self._served.parameters.read_gradients(gradient)
        return gradient

    def _put(self, model: Tensor) -> None:
        self._flat.vector.copy_(model)
        self._served.parameters.write(self._flat)
