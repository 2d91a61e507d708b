"""A collective that was started."""

from __future__ import annotations

from torch import Tensor


class Pending:
    """A collective under way; this one is done already."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def poll(self) -> None:
        """Let it make progress, where the backend moves only when it is called."""
        return

    def wait(self) -> Tensor:
        """The result, when it is there."""
        return self._result
