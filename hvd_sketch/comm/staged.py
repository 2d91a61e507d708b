"""Collectives of a device's tensors through host memory, for backends that reach no further."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_sketch.comm.pending import Pending

Post = Callable[[Tensor], Pending]


class _Outgoing(NamedTuple):
    """A copy on its way to the host, and what tells when it is there."""

    host: Tensor
    event: torch.cuda.Event


def _copy_out(tensor: Tensor) -> _Outgoing:
    """Begin to copy to page-locked memory; PyTorch gives it out again when the device is through with it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return _Outgoing(host, event)


class HostStaging:
    """Carries messages between a device and a backend of the host, in the order in which they were given.

    A message is copied behind the kernels that fill it, and the backend is called when it has arrived: at the next
    `Pending.poll` or, at last, `Pending.wait`. So whoever starts a collective, a hook of backward say, does not wait
    for the device. The way back is queued on the device's current stream.
    """

    def __init__(self) -> None:
        self._leaving: deque[_Staged] = deque()

    def post(self, post: Post, tensor: Tensor, into: Tensor | None) -> Pending:
        """Hand ``tensor`` to the backend's ``post`` when it is on the host; the result goes ``into`` a tensor."""
        staged = _Staged(self, post, tensor, into)
        self._leaving.append(staged)
        return staged

    def advance(self) -> None:
        """Post what has arrived, up to the first message that has not."""
        while self._leaving and self._leaving[0].arrived():
            self._leaving.popleft().begin()

    def post_until(self, last: Pending | None) -> None:
        """Post all messages up to this one, or all; waits for the device."""
        while self._leaving:
            first = self._leaving.popleft()
            first.begin()
            if first is last:
                return


class _Staged(Pending):
    def __init__(self, staging: HostStaging, post: Post, tensor: Tensor, into: Tensor | None) -> None:
        self._staging, self._post, self._device, self._into = staging, post, tensor.device, into
        self._outgoing = _copy_out(tensor)
        self._pending: Pending | None = None

    def arrived(self) -> bool:
        """Whether the message is on the host."""
        return bool(self._outgoing.event.query())

    def begin(self) -> None:
        """Give it to the backend."""
        self._outgoing.event.synchronize()
        self._pending = self._post(self._outgoing.host)

    def poll(self) -> None:
        self._staging.advance()
        if self._pending is not None:
            self._pending.poll()

    def wait(self) -> Tensor:
        if self._pending is None:
            self._staging.post_until(self)
        assert self._pending is not None
        on_host = self._pending.wait()
        if self._into is None:
            return on_host.to(self._device, non_blocking=True)
        return self._into.copy_(on_host, non_blocking=True)
