"""A worker's model between two messages, without any communication."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.message import Header
from hvd_sketch.saved import Form

Transform = Callable[[Tensor], Tensor]
"""Changes an update before it leaves; may work in place."""

MemoryUse = Literal["reset", "feedback", "none"]
"""What a worker does with what a code left out, see `Work`."""


class Work:
    """What a worker holds of the server's model, what it did since, and what it has not sent yet.

    With the server's model x as this worker knows it, the parameters z it went to from z_0, and what is
    unsent, E, all in units of the update::

        E <- E + (z_0 - z)          u = C(E),  E <- E - u          push u, get the new x
        z, z_0 <- x - E             memory "reset": error reset, as in CSER
        z, z_0 <- x                 memory "feedback": error feedback
        z, z_0 <- x,  E <- 0        memory "none"

    So with error reset a worker goes on from where it was, whatever the code left out, and
    ``z_0 + E`` is x. What the parameters' dtype cannot hold of x - E is no part of the next update.

    Args:
        parameters: that train.
        up: C.
        down: the code of the server's answers, or None for whole models.
        memory: which of the three.
        outgoing: transforms of ``z_0 - z``, before it enters E.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        up: Code,
        down: Code | None,
        *,
        memory: MemoryUse,
        outgoing: Sequence[Transform] = (),
    ) -> None:
        self._flat, self._up, self._down = parameters, up, down
        self._memory, self._outgoing = memory, outgoing
        self.held, self._base, self._live = parameters.new(), parameters.new(), parameters.new()
        self.errors = torch.zeros_like(self.held.vector)
        self._whole = Whole(self.errors.numel(), self.errors.dtype)
        self._messages = 0
        self._under_way = False

    def update(self, *, whole: bool = False) -> tuple[int, Tensor, bool]:
        """The number of the code and the payload of the coming push; all that is unsent with ``whole``.

        Work that is not finite is given up; the last of the results says whether it was.
        """
        moved = self._moved()
        finite = math.isfinite(torch.linalg.vector_norm(moved, math.inf))
        if not finite:
            moved.zero_()
        for transform in self._outgoing:
            moved = _checked(transform, transform(moved), moved)
        self.errors.add_(moved)
        code = self._whole if whole else self._up
        payload = code.encode(self.errors, self._messages)
        if self._memory == "none":
            self.errors.zero_()
        self._messages += 1
        return code.number, payload, finite

    def adopt(self, header: Header, payload: Tensor) -> None:
        """Take the server's answer, and go on from there."""
        if header.code == Whole.number:
            self.held.vector.copy_(self._whole.values(payload))
        else:
            assert self._down is not None
            self._down.add(payload, self.held.vector)
        self._live.vector.copy_(self.held.vector)
        if self._memory == "reset":
            self._live.vector.sub_(self.errors)
        self._flat.write(self._live)
        self._flat.read(self._base)
        self._under_way = True

    def rest(self) -> None:
        """All is done: what the parameters hold from now on is no work of this worker, as before its first model."""
        self._under_way = False

    def restart(self) -> None:
        """Begin anew at the parameters as they are, with nothing unsent."""
        self._flat.read(self._base)
        self.errors.zero_()

    def state_dict(self, own: Flat | None = None) -> dict[str, Any]:
        """What is not sent yet, work under way included, and the number of messages.

        Args:
            own: the worker's model, where the parameters hold another one.
        """
        return {"errors": self.errors + self._moved(own), "messages": self._messages}

    def state_form(self) -> dict[str, Form]:
        """What a state that can be loaded here looks like; see `hvd_sketch.saved`."""
        return {"errors": self.errors, "messages": int}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, before the first model is adopted."""
        self.errors.copy_(state["errors"])
        self._messages = state["messages"]

    def _moved(self, own: Flat | None = None) -> Tensor:
        if not self._under_way:
            return self._live.vector.zero_()
        if own is None:
            self._flat.read(self._live)
        else:
            self._live.vector.copy_(own.vector)
        return torch.sub(self._base.vector, self._live.vector, out=self._live.vector)


def _checked(transform: Transform, sent: Tensor, update: Tensor) -> Tensor:
    """What a transform made of an update.

    Raises:
        ConfigurationError: when it cannot be one.
    """
    if isinstance(sent, Tensor) and sent.shape == update.shape and sent.dtype == update.dtype:
        return sent
    form = f"{tuple(sent.shape)} {sent.dtype}" if isinstance(sent, Tensor) else repr(sent)
    raise ConfigurationError(
        f"outgoing: {transform!r} must return a tensor like the update that it is given, {tuple(update.shape)} "
        f"{update.dtype}, and returned {form}"
    )
