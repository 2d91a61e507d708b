"""Taking a step of an optimizer back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Undo:
    """Puts an optimizer's own state, momentum and step counts, back to what it was; parameters are not touched.

    State: one more copy of the optimizer's, kept from step to step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state: dict[Any, dict[Any, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []

    def note(self) -> None:
        """Remember the present state."""
        self._groups = [dict(group) for group in self._optimizer.param_groups]
        self._state = {
            owner: {key: value if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in state.items()}
            for owner, state in self._optimizer.state.items()
        }
        self._tensors = [
            value for state in self._state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        if list(map(_kind, self._tensors)) != list(map(_kind, self._copies)):
            self._copies = [torch.empty_like(tensor) for tensor in self._tensors]
        if self._tensors:
            torch._foreach_copy_(self._copies, self._tensors)

    def restore(self) -> None:
        """Go back to what `note` saw last, once."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, noted in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.clear()
            group.update(noted)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
