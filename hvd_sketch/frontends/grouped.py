"""An exchange by hosts where there are any, unless a part of the model would be too small for that."""

from __future__ import annotations

from collections.abc import Callable

from hvd_sketch.comm.hosts import Hosts
from hvd_sketch.errors import NothingGainedError
from hvd_sketch.exchange import Exchange


def grouped(make: Callable[[Hosts | None], Exchange], hosts: Hosts | None, note: str) -> Exchange:
    """An exchange that is made with hosts, or without those that nobody asked for.

    Args:
        make: makes it.
        hosts: that were found.
        note: what is logged of them.

    Raises:
        ConfigurationError: alike on all ranks.
    """
    try:
        exchange = make(hosts)
    except NothingGainedError as reason:
        if hosts is None or hosts.wanted:
            raise
        exchange, note = make(None), f"each rank has a memory of its own, for by hosts it would be: {reason}"
    exchange.log.notes += [note] if note else []
    return exchange
