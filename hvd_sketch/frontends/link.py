"""The ranks of one optimizer, found when they are needed."""

from __future__ import annotations

import os
from typing import Any

from hvd_sketch.comm import Communicator, as_communicator, chosen_backend, default_communicator


class Link:
    """The communicator of an optimizer. Horovod's is made on first use: it may be initialised after wrapping.

    Any other is made now, because to make one is a collective call, and hooks fire in any order.
    """

    def __init__(self, comm: Any, process_set: Any) -> None:
        self._explicit = comm is not None
        self._process_set = process_set
        self._comm: Communicator | None = as_communicator(comm) if comm is not None else None
        if chosen_backend() != "horovod":
            self.communicator()

    def __deepcopy__(self, memo: Any) -> Link:
        return self

    def __reduce__(self) -> Any:
        """What is loaded from a pickle trains with whatever ranks there are then."""
        return Link, (None, None)

    def communicator(self) -> Communicator:
        """The ranks to exchange with."""
        if self._comm is None:
            self._comm = default_communicator(self._process_set)
        return self._comm

    def is_active(self) -> bool:
        """Whether there is anybody to exchange with, or the caller insists."""
        comm = self.communicator()
        return comm.included and (self._explicit or comm.size > 1 or os.environ.get("HOROVOD_ELASTIC") == "1")
