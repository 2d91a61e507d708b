"""The compressor that picks another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.hosts import Hosts
from hvd_sketch.compressors.base import Bucketed
from hvd_sketch.compressors.sharded import Sharded
from hvd_sketch.compressors.sketch import Sketch
from hvd_sketch.exchange import Exchange, Setting
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum
from hvd_sketch.sparse.codec import SparseCodec

_LEAST_CODE = 2 * SparseCodec.LEVEL_BYTES


@dataclass(frozen=True, eq=False, kw_only=True)
class Auto(Bucketed):
    """`Sharded`, unless ranks are too many for the model: then `Sketch`.

    Of all exchanges `Sharded` ended nearest to dense training, at every ratio and number of ranks
    that was measured, see docs/convergence.md. But it sends a code to every owner, whose 32 bytes
    of levels do not shrink. Where they would be more than the pairs', with more ranks than
    ``parameters / (16 ratio)``, a sketch still has the size of a sketch; that of a model so small for
    its ranks is not cut into buckets.
    """

    dense_below: int | None = 0

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
        """The exchange of the member that suits the model and the number of ranks."""
        member = self._member(layout, comm.size)
        exchange = member.exchange(layout, comm, average=average, device=device, momentum=momentum, hosts=hosts)
        there = f"there are {self._code(layout, comm.size):.0f} bytes for each owner"
        exchange.log.notes.append(f"auto chose {type(member).__name__}: {there} of Sharded, which needs {_LEAST_CODE}")
        return exchange

    def fit(self, layout: Layout, ratio: float, ranks: int) -> Any:
        """What the member makes of it."""
        return self._member(layout, ranks).fit(layout, ratio, ranks)

    def build(self, setting: Setting) -> Exchange:
        """The exchange of the member."""
        return self._member(setting.layout, setting.comm.size).build(setting)

    def _member(self, layout: Layout, ranks: int) -> Sharded | Sketch:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return Sharded(**settings) if self._code(layout, ranks) >= _LEAST_CODE else Sketch(**settings)

    def _code(self, layout: Layout, ranks: int) -> float:
        """How many bytes the ratio leaves for each owner."""
        return 4 * layout.total / self.ratio / ranks
