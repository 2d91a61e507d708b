"""The ranks of one optimizer, and their hosts, found when they are needed."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from hvd_sketch.comm import Communicator, as_communicator, default_communicator, is_connected
from hvd_sketch.comm.hosts import Asked, Hosts, find_hosts
from hvd_sketch.errors import ConfigurationError


class Link:
    """The communicator of an optimizer. Horovod's is made on first use if it is initialised after wrapping.

    Any other is made now, because to make one is a collective call, and hooks fire in any order. So are the
    communicators of hosts.

    Args:
        comm: the user's, if there is one.
        process_set: Horovod's, if there is one.
        asked: whether there are to be groups of ranks.
        apart: whether they are used by a thread of their own.

    Attributes:
        hosts: the groups of ranks that share a memory; None where each has its own.
        note: what is logged of them.

    Raises:
        ConfigurationError: for groups that cannot be had.
    """

    def __init__(self, comm: Any, process_set: Any, asked: Asked = False, *, apart: bool = False) -> None:
        self._explicit = comm is not None
        self._process_set, self._asked, self._apart = process_set, asked, apart
        self._comm: Communicator | None = self._of_its_own(as_communicator(comm)) if comm is not None else None
        self.hosts: Hosts | None = None
        self.note = ""
        if is_connected():
            self.communicator()
        if self._comm is not None:
            self.hosts, self.note = find_hosts(self._comm, asked)
        elif asked:
            raise ConfigurationError(
                f"hierarchical={asked} needs ranks that are connected, and Horovod is not initialised yet; call "
                "hvd.init() before you wrap an optimizer"
            )

    def __deepcopy__(self, memo: Any) -> Link:
        return self

    def __reduce__(self) -> Any:
        """What is loaded from a pickle trains with whatever ranks there are then."""
        return partial(Link, apart=self._apart), (None, None, self._asked)

    def communicator(self) -> Communicator:
        """The ranks to exchange with."""
        if self._comm is None:
            self._comm = self._of_its_own(default_communicator(self._process_set))
        return self._comm

    def _of_its_own(self, comm: Communicator) -> Communicator:
        return comm.apart() if self._apart and comm.included else comm

    def is_active(self) -> bool:
        """Whether there is anybody to exchange with, or the caller insists."""
        comm = self.communicator()
        return comm.included and (self._explicit or comm.size > 1 or os.environ.get("HOROVOD_ELASTIC") == "1")
