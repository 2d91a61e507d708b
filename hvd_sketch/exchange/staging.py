"""The step's gradients on their way into one vector, measured as they arrive."""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import gpu, native
from hvd_sketch.exchange.domain import Domain
from hvd_sketch.layout import Layout


class Staging:
    """One vector for the gradients of all slots, in any order; a slot that gets none counts as zero.

    On a GPU they may come on several streams, on which backward calls its hooks: each follows the one before.

    Attributes:
        vector: the gradients in the coordinates of a `Domain`, float32, of the layout's size; stays as it is until
            the next step's arrive.
    """

    def __init__(self, layout: Layout, device: torch.device, domain: Domain | None = None) -> None:
        self.vector = torch.zeros(layout.total, dtype=torch.float32, device=device)
        self._slots, self._order, self._domain = layout.slots, gpu.InOrder(device), domain or Domain(layout, None)
        self._parts = [self.vector[slot.offset : slot.stop] for slot in layout.slots]
        self._arrived = [False] * len(self._slots)
        self._squares: list[float | None] = [0.0] * len(self._slots)
        """Of each slot: the sum of its squares, if the copy came with it."""
        self._gathered: set[int] = set()
        """Slots of which `Gathering` has the sum."""

    def put(
        self, position: int, gradient: Tensor, factor: float, parameter: Tensor | None, weight_decay: float
    ) -> None:
        """Set slot ``position`` to ``factor * gradient + weight_decay * parameter``."""
        self._order.here()
        self._copy(position, gradient, factor, parameter, weight_decay)
        self._enter([position])

    def _copy(
        self, position: int, gradient: Tensor, factor: float, parameter: Tensor | None, weight_decay: float
    ) -> None:
        part = self._parts[position]
        self._squares[position] = None
        self._gathered.discard(position)
        self._arrived[position] = True
        if parameter is None and native.serves_floats(gradient) and native.serves(part):
            self._squares[position] = native.library().stage_gradient(
                native.address(gradient, torch.float32, part.numel()),
                part.data_ptr(),
                part.numel(),
                factor,
                self.vector.numel(),
                torch.get_num_threads(),
            )
            return
        shaped = part.view(gradient.shape)
        shaped.copy_(gradient)
        if factor != 1.0:
            shaped.mul_(factor)
        if parameter is not None:
            shaped.add_(parameter.detach(), alpha=weight_decay)

    def put_many(self, gradients: Mapping[int, Tensor], factor: float) -> None:
        """Set the slots of these gradients to ``factor`` times them; on a GPU by one kernel."""
        self._order.here()
        together = {}
        if gpu.serves(self.vector):
            together = {at: grad for at, grad in gradients.items() if self._gathering.serves(grad, self.vector)}
        if together:
            self._gathering(together, factor)
        for position, gradient in gradients.items():
            if position in together:
                self._squares[position], self._arrived[position] = None, True
                self._gathered.add(position)
            else:
                self._copy(position, gradient, factor, None, 0.0)
        self._enter(gradients)

    def put_all(self, vector: Tensor) -> None:
        """Set all slots, in the layout's order."""
        self._order.here()
        self.vector.copy_(vector)
        self._squares = [None] * len(self._slots)
        self._gathered.clear()
        self._arrived = [True] * len(self._slots)
        self._enter(range(len(self._slots)))

    def _enter(self, positions: Collection[int]) -> None:
        """Bring slots that have arrived, measured as they came, into the domain."""
        if self._domain.is_models:
            return
        for position in positions:
            if self._squares[position] is None and position not in self._gathered:
                norm = torch.linalg.vector_norm(self._parts[position], dtype=torch.float64)
                self._squares[position] = float(norm) ** 2
        if len(positions) == len(self._slots):
            self._domain.enter_all(self.vector)
            return
        for position in positions:
            self._domain.enter(self._parts[position], position)

    def complete(self, positions: slice) -> bool:
        """Whether all of these slots have arrived."""
        return all(self._arrived[positions])

    def close(self) -> list[int]:
        """End a step: what has not arrived is zero. The next `put` begins another step.

        Returns:
            the positions of what has not arrived.
        """
        self._order.here()
        missing = [position for position, arrived in enumerate(self._arrived) if not arrived]
        for position in missing:
            self._parts[position].zero_()
            self._squares[position] = 0.0
            if position in self._gathered:
                self._gathering.clear(position)
        self.forget()
        return missing

    def take_back(self, position: int) -> None:
        """Undo a `put`."""
        self._arrived[position] = False

    def forget(self) -> None:
        """Count nothing as arrived."""
        self._arrived = [False] * len(self._slots)

    @property
    def gathered(self) -> bool:
        """Whether all of the gradient was measured by the kernel that gathered it."""
        return len(self._gathered) == len(self._slots)

    def measure(self, limit: float | None) -> tuple[Tensor, Tensor]:
        """Of a gradient that was `gathered`, on its device, as tensors of one number.

        Returns:
            the factor that brings its norm down to ``limit``, if it is larger, and 0 if it is finite, else NaN.
        """
        factor, finite = self._gathering.measure(limit)
        return factor, finite

    def norm(self, positions: slice = slice(None)) -> float:
        """The 2-norm of these slots, summed in float64; infinite or NaN only if an entry is.

        Rounded to float32, so that all backends give the same, unless it is too large for that.
        """
        slots, squares = self._slots[positions], self._squares[positions]
        known = [square for square in squares if square is not None]
        if len(known) == len(squares):
            return _rounded(math.sqrt(sum(known)))
        if self._gathered.issuperset(range(*positions.indices(len(self._slots)))):
            return _rounded(math.sqrt(float(self._gathering.squares(positions))))
        part = self.vector[slots[0].offset : slots[-1].stop]
        return _rounded(float(torch.linalg.vector_norm(part, dtype=torch.float64)))

    @cached_property
    def _gathering(self) -> Any:
        kernels = importlib.import_module("hvd_sketch.exchange.staging_cuda")  # with Triton
        return kernels.Gathering([(slot.offset, slot.stop) for slot in self._slots], self.vector)


def _rounded(norm: float) -> float:
    single = ctypes.c_float(norm).value
    return norm if math.isinf(single) else single
