"""Everything in one flat message: what compression is measured against."""

from __future__ import annotations

import torch

from hvd_sketch.comm.base import Communicator
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.layout import Layout


class DenseExchange(Exchange):
    """Plain averaging of the gradients, in float32 or float16 on the wire.

    Stands in for Horovod's own ``none`` and ``fp16`` where Horovod is not installed. Sends
    ``total + 4`` values in one allreduce; there is no memory, half precision just rounds.
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
        super().__init__(
            layout,
            comm,
            f"dense {dtype}",
            average=average,
            clip_norm=None,
            momentum=None,
            device=device,
        )
        self._dtype = dtype

    def _send_selected(self, clip: float, finite: bool) -> bool:
        return self._send_everything(clip, finite, self._dtype)
