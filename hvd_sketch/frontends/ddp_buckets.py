"""The buckets of gradients that one backward pass of a DistributedDataParallel model hands to its hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed's own, which it does not export to type checkers
from torch.autograd import Variable

from hvd_sketch.errors import ConfigurationError


class Buckets:
    """From the first one to the last, with which all are completed.

    Args:
        positions: of the parameters.

    Attributes:
        promised: the futures of those that have come, with what they will have.
        used: the positions of the parameters to whose gradients backward has added on this rank.
        views: all gradients in the buckets that have come, by position.
        stale: those of them that are not used, and left over from an earlier pass.
    """

    def __init__(self, positions: Mapping[Tensor, int]) -> None:
        self._positions = positions
        self.promised: list[tuple[torch.futures.Future[Tensor], Tensor]] = []
        self.used: set[int] = set()
        self.views: dict[int, Tensor] = {}
        self.stale: dict[int, Tensor] = {}

    def promise(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """A future of a bucket's gradients."""
        buffer = bucket.buffer()
        future = torch.futures.Future[Tensor](devices=[] if buffer.device.type == "cpu" else [buffer.device])
        self.promised.append((future, buffer))
        return future

    def take(self, bucket: GradBucket) -> dict[int, Tensor]:
        """Those of a bucket's gradients that were used on this rank; the rest is zero, or stale."""
        laid_out = map(_as_laid_out, bucket.gradients(), bucket.parameters())
        gradients = dict(zip(self.positions(bucket), laid_out, strict=True))
        self.views.update(gradients)
        unused = {position: gradient for position, gradient in gradients.items() if position not in self.used}
        self.stale.update((position, gradient) for position, gradient in unused.items() if bool(gradient.any()))
        return {position: gradient for position, gradient in gradients.items() if position not in unused}

    def positions(self, bucket: GradBucket) -> list[int]:
        """Of a bucket's parameters.

        Raises:
            ConfigurationError: for a parameter that is not known.
        """
        return [self._position_of(parameter) for parameter in bucket.parameters()]

    def close(self) -> None:
        """The pass is over."""
        self.promised = []
        self.used.clear()
        self.views.clear()
        self.stale.clear()

    def _position_of(self, parameter: Tensor) -> int:
        position = self._positions.get(parameter)
        if position is None:
            raise ConfigurationError(
                f"the model trains a parameter of shape {tuple(parameter.shape)} that the optimizer does not hold; "
                "give State named_parameters=model.named_parameters(), or call hvd_sketch.ddp.register"
            )
        return position


def after_backward(call: Callable[[], None]) -> None:
    """Call this at the end of this backward pass, once the model has put the gradients in their place."""
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(call))  # behind the model's own, which is queued after its last hook


def _as_laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A bucket's gradient with the strides of its parameter, in which order a bucket has the values of dense ones."""
    if parameter.is_contiguous() or torch.empty_like(parameter, device="meta").stride() != parameter.stride():
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride(), gradient.storage_offset())
