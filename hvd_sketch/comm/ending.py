"""How this process ends: whether by an error, and what is then to be done for the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class Ending:
    """Notes the exception that ends this process; the handlers of `atexit` then know of it.

    Attributes:
        failure: the exception in a line; None while there is none.
        aborts: whether a failure is to end the other ranks as well.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.aborts = True
        self._previous: Hook | None = None
        self._told: list[Callable[[BaseException], None]] = []

    def watch(self) -> None:
        """Note from now on what ends the process."""
        if self._previous is None:
            self._previous, sys.excepthook = sys.excepthook, self._hook

    def tell(self, on_failure: Callable[[BaseException], None]) -> None:
        """Call this when an exception ends the process, behind what prints it."""
        self.watch()
        if on_failure not in self._told:
            self._told.append(on_failure)

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        assert self._previous is not None
        self._previous(kind, error, trace)
        self.failure = f"{kind.__name__}: {error}".splitlines()[0]
        for on_failure in self._told:
            on_failure(error)


ending = Ending()
