"""Compression for scripts that were not written for it: where it would gain nothing, training is dense."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.hosts import Hosts
from hvd_sketch.compressors import Compressor
from hvd_sketch.errors import NothingGainedError
from hvd_sketch.exchange import DenseExchange, Exchange, Setting
from hvd_sketch.layout import DensePredicate, Layout
from hvd_sketch.memory import Momentum

_logger = logging.getLogger("hvd_sketch")


@dataclass(frozen=True, eq=False, kw_only=True)
class OrDense(Compressor):
    """Another compressor, or a dense exchange of a model that is too small for it.

    Attributes:
        wanted: the other one.
    """

    wanted: Compressor

    @property
    def wants_anticipation(self) -> bool:
        """The other's."""
        return self.wanted.wants_anticipation

    @property
    def divides(self) -> bool:
        """The other's."""
        return self.wanted.divides

    @property
    def _told(self) -> Compressor:
        """The other one, which knows what this one was told."""
        return replace(self.wanted, anticipate=self.anticipate)

    def layout(self, named_parameters: Iterable[tuple[str, Tensor]], is_dense: DensePredicate | None = None) -> Layout:
        """The other's; of a model that is too small, one of which everything is sent whole."""
        named = list(named_parameters)
        try:
            return self._told.layout(named, is_dense)
        except NothingGainedError:
            return Layout.of(named, lambda name, parameter: True)

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
        """The other's, or a dense one, of which rank 0 is told.

        Raises:
            NothingGainedError: where parts of the model are too small, one for each rank of a host, see `grouped`.
        """
        try:
            if layout.compressed == 0:
                raise NothingGainedError("all parameters are 1-D, small or excluded")
            return self._told.exchange(layout, comm, average=average, device=device, momentum=momentum, hosts=hosts)
        except NothingGainedError as reason:
            if hosts is not None and layout.compressed:
                raise
            if comm.rank == 0:
                _logger.warning("hvd_sketch: the model is too small to compress and trains dense: %s", reason)
            return DenseExchange(layout, comm, average=average, device=device)

    def plan(self, layout: Layout, step: int, ranks: int) -> Any:
        """The other's."""
        return self._told.plan(layout, step, ranks)

    def build(self, setting: Setting) -> Exchange:
        """The other's."""
        return self._told.build(setting)
