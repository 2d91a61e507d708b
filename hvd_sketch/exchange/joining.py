"""A rank that has no more data takes part with zeros, until no rank has any."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.copies import majority, thrice
from hvd_sketch.exchange.base import Exchange


def stand_in(exchanges: Sequence[Exchange], comm: Communicator) -> int:
    """Take part in the steps of the ranks that go on, adding zeros to every sum, until all ranks are here.

    For networks where an operation waits for every rank; Horovod itself adds zeros for a rank in ``hvd.join()``.
    Memories, steps and schedules here stay as they are. A rank that goes on must run these exchanges in turn,
    and no other collective.

    Args:
        exchanges: of the ranks of ``comm``, in the order in which the others run them.
        comm: the ranks.

    Returns:
        the rank that was the last one to come here.
    """
    steps = 0
    while exchanges and all(attend(exchange) for exchange in exchanges):
        steps += 1
    return last_to_join(comm, steps)


def attend(exchange: Exchange) -> bool:
    """Take part in one step, adding zeros; whether some rank had a gradient.

    It leaves no trace here, but in a memory that belongs to other ranks too, if any of all had a gradient.
    """
    undo = exchange.snapshot()
    exchange.comm.muted = True
    try:
        exchange.run()
    finally:
        exchange.comm.muted = False
        if not (exchange.shares_memory and exchange.rounds.present):
            undo()
    missed = exchange.rounds.present > 0
    exchange.drift.missed += missed
    return missed


def last_to_join(comm: Communicator, steps: int) -> int:
    """Collective: the rank that stood in for the fewest steps; the highest of them."""
    waited = torch.zeros(comm.size, dtype=torch.int64, device="cpu")
    waited[comm.rank] = steps
    message = thrice(waited)
    comm.allreduce(message, "hvd_sketch.joined")
    told = majority(message.tolist())
    return max(range(comm.size), key=lambda rank: (-told[rank], rank))
