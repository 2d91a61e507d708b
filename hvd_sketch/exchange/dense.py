"""Everything in one flat message: what compression is measured against."""

from __future__ import annotations

from typing import Any

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.intake import Factor, Finite
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.layout import Layout


class DenseExchange(Exchange):
    """Plain averaging of the gradients, in float32 or float16 on the wire.

    Stands in for Horovod's own ``none`` and ``fp16`` where Horovod is not installed. Sends
    ``total + 4`` values in one allreduce; nothing is kept, half precision just rounds.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        *,
        average: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        name = f"dense {dtype}"
        super().__init__(
            Setting(layout=layout, comm=comm, device=device, plan=_everything, name=name, average=average)
        )
        self._dense_dtype = dtype

    def send(self, plan: Any, clip: Factor, finite: Finite) -> bool:
        """Never called: no step has a plan."""
        raise NotImplementedError("DenseExchange sends everything in every step")


def _everything(step: int, ranks: int) -> None:
    return None
