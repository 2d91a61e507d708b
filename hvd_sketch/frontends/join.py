"""``hvd.join()``: ranks with more data than others go on, and the others catch up with them."""

from __future__ import annotations

import gc
from typing import Any

from hvd_sketch.comm import Communicator, default_communicator, has_horovod
from hvd_sketch.comm.states import broadcast_state
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import HierarchicalExchange
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.gradients import Watcher, watchers
from hvd_sketch.exchange.joining import stand_in
from hvd_sketch.instances import instances_of
from hvd_sketch.methods.decentralized import Decentralized
from hvd_sketch.methods.delayed import DelayedOptimizer


def join(device: int = -1) -> int:
    """Say that this rank has no more data, and wait until no rank has any.

    Until then it counts as one whose gradients are zero, and the others send what they compress whole where that
    takes more than sums. Then ranks that missed steps take over parameters and optimizer state of the
    rank that was the last to join, so that all are the same again; what a rank has not sent yet stays its own.

    Without Horovod, with ``comm=``, and where ranks of a host share a memory, only optimizer steps may follow on the
    other ranks, and no other collective: of the optimizer that was made last, and in turn of those that have done as
    many steps.

    Args:
        device: accepted as Horovod does.

    Returns:
        the rank that was the last to join.

    Raises:
        ConfigurationError: for an optimizer of a process set, to whose ranks Horovod would not answer, and for one
            with a gradient in flight.
    """
    _refuse_models_of_their_own()
    _refuse_gradients_in_flight()
    optimizers = watchers()
    exchanges = [optimizer.exchange for optimizer in optimizers.values()]
    by_name = [_answers_by_name(exchange) for exchange in exchanges]
    by_order = [] if all(by_name) else _in_use(exchanges)
    comm = by_order[0].comm if by_order else default_communicator()
    last = stand_in(by_order, comm) if by_order or not has_horovod() else _join_horovod(device)
    _catch_up(comm, optimizers, last)
    return last


def _in_use(exchanges: list[Exchange]) -> list[Exchange]:
    """Those of an earlier phase of training, whose optimizers are still alive, have done other numbers of steps."""
    return [exchange for exchange in exchanges if exchange.stats.steps == exchanges[-1].stats.steps]


def _refuse_models_of_their_own() -> None:
    gc.collect()  # what is no longer used is no obstacle
    for found in instances_of(Decentralized):  # type: ignore[type-abstract]
        raise ConfigurationError(
            f"hvd.join() cannot stand in for a rank that trains with {type(found).__name__}, where every rank has "
            "a model of its own; give all ranks equally many steps"
        )


def _refuse_gradients_in_flight() -> None:
    gc.collect()
    if instances_of(DelayedOptimizer):
        raise ConfigurationError(
            "hvd.join() cannot stand in for a rank whose optimizer has delayed=True, for a gradient of it is in "
            "flight; give all ranks equally many steps, or leave delayed away"
        )


def _answers_by_name(exchange: Exchange) -> bool:
    """Whether Horovod adds zeros to the sums of a rank that has joined, which it does among all ranks alone."""
    if not has_horovod():
        return False
    from hvd_sketch.comm.horovod import HorovodCommunicator

    comm = exchange.comm
    if isinstance(comm, HorovodCommunicator) and comm.included and comm.process_set.process_set_id != 0:
        raise ConfigurationError(
            "hvd.join() stands in for a rank among all ranks, and an optimizer here trains on a process set; give "
            "the ranks of the process set equally many steps"
        )
    return isinstance(comm, HorovodCommunicator) and not isinstance(exchange, HierarchicalExchange)


def _join_horovod(device: int) -> int:
    from horovod.torch import mpi_ops  # where it stays Horovod's, also under the runner of scripts

    return int(mpi_ops.join(device))


def _catch_up(comm: Communicator, optimizers: dict[int, Watcher], last: int) -> None:
    """Collective: where some ranks have stepped without others, all go on with what the last one has."""
    stepped = {number: one for number, one in optimizers.items() if _stepped_alone(one.exchange)}
    states: dict[int, Any] = {number: one.shared_state() for number, one in stepped.items()}
    states = broadcast_state(comm, states, last, "hvd_sketch.joined")
    for number in sorted(states.keys() & optimizers.keys()) if comm.rank != last else ():
        optimizers[number].take_over(states[number])
        optimizers[number].exchange.rounds.name_of("")  # given here to one that never ran, for names are counted


def _stepped_alone(exchange: Exchange) -> bool:
    partial, exchange.rounds.partial = exchange.rounds.partial, 0
    return partial > 0
