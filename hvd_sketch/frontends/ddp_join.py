"""``model.join()``: a rank without data adds zeros, and goes on with the optimizer's state of one that had data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.algorithms.join import Joinable

from hvd_sketch.comm.states import broadcast_state
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.joining import attend, last_to_join

_loading: list[None] = []


@contextmanager
def keeping_memories() -> Iterator[None]:
    """An optimizer loads what it has on another rank: what is unsent here, of whichever of its models, stays."""
    _loading.append(None)
    try:
        yield
    finally:
        _loading.pop()


def keeps_memories() -> bool:
    """Whether a state that is loaded now is another rank's of this run."""
    return bool(_loading)


class Missed:
    """The steps of a model that others took without this rank, and how it goes on after them.

    DistributedDataParallel has parameters and buffers taken over when no rank has data any more, and nothing else;
    an optimizer's momentum would stay that of each rank, and the models would part.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._steps = exchange, 0

    def attend(self) -> None:
        """Take part in one step with zeros."""
        self._steps += attend(self._exchange)

    def catch_up(self, optimizer: torch.optim.Optimizer | None) -> None:
        """After a step: collective, if it is the first of all ranks since some of them missed one.

        Who missed steps takes over the optimizer's state of a rank that missed the fewest. An optimizer that is
        joined by itself has missed none, as one whose state is divided between the ranks.
        """
        exchange = self._exchange
        if not (exchange.rounds.all_present and exchange.rounds.partial):
            return
        comm, missed, self._steps, exchange.rounds.partial = exchange.comm, self._steps, 0, 0
        name = exchange.rounds.name_of("joined")
        held = None if optimizer is None or isinstance(optimizer, Joinable) else optimizer
        with exchange.stats.counting(comm), exchange.stats.phase("exchange"):
            last = last_to_join(comm, missed)
            mine = held.state_dict() if held is not None and comm.rank == last else None
            state = broadcast_state(comm, mine, last, name)
        if held is not None and state is not None and comm.rank != last:
            with keeping_memories():
                held.load_state_dict(state)
