"""What is served, and losses on trusted data at any model of the server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.methods.flat import HOST, Flat, FlatParameters

Validate = Callable[[nn.Module, int], Tensor]
"""The loss of a model, a scalar that can be differentiated, on validation sample number n = 0, 1, …

It may draw a fresh sample for every number; for one number it must always be the same.
"""


@dataclass(frozen=True)
class Served:
    """What a server serves, and to whom.

    Attributes:
        layout: of the parameters.
        model: on the server's rank.
        samples: how many each worker has, by rank.
    """

    layout: Layout
    model: nn.Module
    samples: dict[int, int]

    @property
    def workers(self) -> list[int]:
        """Ranks of the workers, ascending."""
        return sorted(self.samples)


class Validation:
    """A loss on trusted data, at flat models; on a copy of the model, in host memory."""

    def __init__(self, validate: Validate, served: Served) -> None:
        self._validate = validate
        self._model = copy.deepcopy(served.model).cpu()
        named = dict(self._model.named_parameters())
        self._parameters = FlatParameters(named, served.layout, HOST)
        self._flat = self._parameters.new()

    def nothing(self) -> Tensor:
        """A vector of zeros, like a gradient."""
        return self._parameters.new().vector

    def loss(self, model: Tensor, number: int) -> float:
        """The loss at a model on sample ``number``."""
        self._put(model)
        with torch.no_grad():
            return float(self._scalar(number))

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
        self._model.zero_grad()
        with torch.enable_grad():
            loss = self._scalar(number)
            if not loss.requires_grad:
                raise ConfigurationError(
                    "validate must return a loss that can be differentiated by the parameters of the model it is "
                    "given; compute it from them, and detach nothing"
                )
            torch.autograd.backward(loss)
        gradient = self._parameters.new()
        self._parameters.read_gradients(gradient)
        return gradient

    def _scalar(self, number: int) -> Tensor:
        value = self._validate(self._model, number)
        if not isinstance(value, Tensor) or value.numel() != 1:
            form = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ConfigurationError(f"validate must return a loss, a tensor of one value, and returned {form}")
        return value

    def _put(self, model: Tensor) -> None:
        self._flat.vector.copy_(model)
        self._parameters.write(self._flat)
