"""Settings of low-rank averaging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator
from hvd_sketch.compressors.base import Compressor
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange, PowerSGDExchange
from hvd_sketch.exchange.powersgd import matrix_shape
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Momentum


@dataclass(frozen=True, eq=False, kw_only=True)
class PowerSGD(Compressor):
    """Low-rank averaging, the strongest rival of sparse updates for matrices; see `PowerSGDExchange`.

    Matrices that a rank-r product would not shrink are sent whole.

    Attributes:
        rank: of the product that stands for each matrix; the compression ratio follows from it.
        start_step: steps before this one are dense.
        seed: of the first right factors; equal on all ranks.
    """

    rank: int = 2
    start_step: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigurationError(f"rank must be at least 1, got {self.rank}")
        if self.start_step < 0:
            raise ConfigurationError(f"start_step must be at least 0, got {self.start_step}")

    def is_dense(self, name: str, parameter: Tensor) -> bool:
        """Also true of a matrix that the product of two factors would not shrink."""
        if super().is_dense(name, parameter):
            return True
        n, m = matrix_shape(tuple(parameter.shape))
        return self.rank * (n + m) >= n * m

    def _exchange(
        self, layout: Layout, comm: Communicator, *, average: bool, device: torch.device, momentum: Momentum | None
    ) -> Exchange:
        return PowerSGDExchange(
            layout,
            comm,
            repr(self),
            rank=self.rank,
            start_step=self.start_step,
            seed=self.seed,
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum,
            device=device,
        )
