"""The compressor that picks another."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.hosts import Hosts
from hvd_sketch.compressors import rule
from hvd_sketch.compressors.base import Bucketed
from hvd_sketch.compressors.sharded import Sharded
from hvd_sketch.compressors.sketch import Sketch
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange, Setting
from hvd_sketch.exchange.log import LOGGER
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


@dataclass(frozen=True, eq=False, kw_only=True)
class Auto(Bucketed):
    """`Sharded`, unless ranks are too many for the model: then `Sketch`. With what is known of the links, the fastest.

    Of all exchanges `Sharded` ended nearest to dense training, at every ratio and number of ranks
    that was measured, see docs/convergence.md. But it sends a code to every owner, whose 18 bytes
    of levels and checksum do not shrink. Where they would be more than the pairs', with more ranks than
    ``parameters / (9 ratio)``, a sketch still has the size of a sketch; that of a model so small for
    its ranks is not cut into buckets.

    With ``delay`` and ``mbit``, the same on all ranks, the choice is that of `hvd_sketch.compressors.rule`, which may
    also be to send everything in every step.

    Attributes:
        delay: milliseconds that small messages from all ranks to all take: the log's first line says it where it is
            long, and ``python -m hvd_sketch --check`` under a launcher.
        mbit: what a rank's share of its host's link carries, Mbit/s.
    """

    dense_below: int | None = 0
    delay: float | None = None
    mbit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.delay is None) != (self.mbit is None):
            raise ConfigurationError(f"give both delay and mbit, or none; got {self.delay} and {self.mbit}")
        if self.delay is not None and self.mbit is not None and not (self.delay >= 0.0 and self.mbit > 0.0):
            raise ConfigurationError(f"delay must be at least 0 and mbit above 0, got {self.delay} and {self.mbit}")

    def exchange(
        self,
        layout: Layout,
        comm: Communicator,
        *,
        average: bool,
        device: torch.device,
        momentum: Momentum | None = None,
        hosts: Hosts | None = None,
    ) -> Exchange:
        """The exchange of the member that suits the model, the ranks and the links."""
        conditions = self._conditions(layout, comm.size, negotiates=comm.negotiates)
        if hosts is not None:
            share = conditions.coordinates / hosts.local.size
            conditions = replace(conditions, members=hosts.across.size, coordinates=share)
        kind = self._kind(conditions)
        exchange = self._member(kind).exchange(
            layout, comm, average=average, device=device, momentum=momentum, hosts=hosts
        )
        if self.mbit is not None:
            kinds: tuple[rule.Kind, ...] = ("dense", "sharded", "sketch")
            times = ", ".join(f"{each} {rule.seconds(each, conditions):.2g} s" for each in kinds)
            exchange.log.notes.append(f"auto chose {kind}; predicted are {times}")
            if kind == "dense" and comm.rank == 0:
                LOGGER.info("hvd_sketch: auto sends everything in every step; predicted are %s", times)
        else:
            there = f"there are {conditions.code:.0f} bytes for each owner"
            exchange.log.notes.append(
                f"auto chose {kind.capitalize()}: {there} of Sharded, which needs {rule.LEAST_CODE}"
            )
        return exchange

    def fit(self, layout: Layout, ratio: float, ranks: int) -> Any:
        """What the member makes of it; None where that sends everything."""
        kind = self._kind(self._conditions(layout, ranks))
        return None if kind == "dense" else self._member(kind).fit(layout, ratio, ranks)

    def build(self, setting: Setting) -> Exchange:
        """The exchange of the member."""
        comm = setting.comm
        kind = self._kind(self._conditions(setting.layout, comm.size, negotiates=comm.negotiates))
        return self._member(kind).build(setting)

    def _conditions(self, layout: Layout, ranks: int, *, negotiates: bool = False) -> rule.Conditions:
        return rule.Conditions(
            members=ranks,
            coordinates=layout.total,
            ratio=self.ratio,
            crossing=1e-3 * (self.delay or 0.0),
            byte=8e-6 / self.mbit if self.mbit else 0.0,
            negotiates=negotiates,
        )

    def _kind(self, conditions: rule.Conditions) -> rule.Kind:
        if self.mbit is not None:
            return rule.choose(conditions)
        return "sharded" if conditions.code >= rule.LEAST_CODE else "sketch"

    def _member(self, kind: rule.Kind) -> Sharded | Sketch:
        settings = {field.name: getattr(self, field.name) for field in fields(Bucketed) if field.init}
        if kind == "dense":
            settings["schedule"] = _everything
        return Sketch(**settings) if kind == "sketch" else Sharded(**settings)


def _everything(step: int) -> float:
    """The ratio of a step in which everything is sent."""
    return 1.0
