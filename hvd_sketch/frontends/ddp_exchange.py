"""How the exchange of a DistributedDataParallel model is made, and what its ranks tell each other in a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hvd_sketch.comm import as_communicator
from hvd_sketch.comm.hosts import Asked, find_hosts
from hvd_sketch.comm.launcher import check_not_alone
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.base import ErrorFeedback
from hvd_sketch.exchange import Exchange
from hvd_sketch.frontends.arguments import check_hierarchical
from hvd_sketch.frontends.ddp_steps import Steps
from hvd_sketch.frontends.grouped import grouped
from hvd_sketch.layout import describe_values


def make_exchange(
    compression: Compressor,
    feedback: ErrorFeedback | None,
    trained: Mapping[str, Tensor],
    process_group: Any,
    hierarchical: Asked,
) -> Exchange:
    """An exchange of means over a process group, the default one if it is None.

    Args:
        compression: what makes it.
        feedback: what it is made for, if hosts are asked for.
        trained: the parameters, by name.
        process_group, hierarchical: as `State` is given them.

    Raises:
        ConfigurationError: when it cannot be made so, alike on all ranks.
    """
    layout, device = compression.layout(trained.items()), next(iter(trained.values())).device
    check_not_alone(dist.get_world_size())
    comm = as_communicator(dist.group.WORLD if process_group is None else process_group)
    hosts, note = find_hosts(comm, check_hierarchical(hierarchical, compression, feedback))
    make = partial(compression.exchange, layout, comm, average=True, device=device)
    return grouped(lambda hosts: make(hosts=hosts), hosts, note)


def refuse_sparse(exchange: Exchange, positions: Iterable[int]) -> None:
    """Tell all ranks, in the step, that the gradient of these slots is sparse."""
    names = ", ".join(exchange.layout.slots[position].name for position in positions)
    exchange.fail_together(f"parameter {names!r} has a sparse gradient; make its embedding with sparse=False")


class Compared:
    """Has the ranks compare what they train, as it is when the first gradient of all is computed.

    Later in that step the parameters may be elsewhere, for an optimizer that looks around; and in any step while
    backward runs they may be ahead, on each rank elsewhere.

    Args:
        exchange: compares, in its first step.
        trained: the parameters, by name.
        steps: know the optimizer, whose groups are compared as well.
    """

    def __init__(self, exchange: Exchange, trained: Mapping[str, Tensor], steps: Steps) -> None:
        self._describe = partial(describe_values, trained)
        self._values: str | None = None
        exchange.watch(trained, lambda: steps.groups)
        exchange.drift.parameters = ()
        exchange.drift.describe_values = self._present

    def note(self, exchange: Exchange) -> None:
        """A gradient is about to be computed."""
        if exchange.step + exchange.stats.steps == 0 and self._values is None:
            self._values = self._describe()

    def forget(self) -> None:
        """The step is over."""
        self._values = None

    def _present(self) -> str:
        return self._describe() if self._values is None else self._values
