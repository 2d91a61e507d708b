"""What optimizers without an allreduce have in common: a model of their own on every rank, and averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.alike import check_alike
from hvd_sketch.exchange.agreement import agree
from hvd_sketch.exchange.log import MethodLog
from hvd_sketch.methods.flat import HOST, FlatModel, LayoutRule, whole
from hvd_sketch.methods.start import start_alike
from hvd_sketch.methods.wrapper import Method
from hvd_sketch.settings import given_numbers
from hvd_sketch.stats import Stats


class Decentralized(Method):
    """A local optimizer and the part of a decentralised method that all of them share.

    The local optimizer's state (momentum) stays on its rank and is never averaged.

    Args:
        optimizer: steps this rank's model; its parameters must be the model's.
        model: what it trains. Buffers (BatchNorm's running statistics) are never sent: each
            rank has its own, except at the same start and inside `average_model`. Those that are not saved
            with the model (``persistent=False``) are left alone there, too.
        comm: collectives over the ranks.
        settings: what must be equal on all ranks, by name.
        same_start: begin with rank 0's parameters and saved buffers on every rank.
        layout: how the parameters become one vector.
        device: where that vector is kept.

    Raises:
        ConfigurationError: for an optimizer of other parameters, or one that needs a closure.
        RankMismatchError: alike on all ranks, when models or settings differ.

    Attributes:
        model: as given.
        stats: what it cost.
    """

    model: torch.nn.Module
    stats: Stats

    @given_numbers
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Communicator,
        settings: dict[str, str],
        *,
        same_start: bool,
        layout: LayoutRule = whole,
        device: torch.device = HOST,
    ) -> None:
        super().__init__(optimizer)
        self._own(model=model, stats=Stats())
        self._collectives = comm
        self._flat = FlatModel(optimizer, model, layout, device)
        self._live = self._flat.new()
        self._averaged = False
        buffers = saved_buffers(model)
        self._buffers = [buffer for _, buffer in sorted(buffers.items()) if buffer.is_floating_point()]
        tensors = sorted([*model.named_parameters(), *buffers.items()], key=lambda item: item[0])
        shapes = " ".join(f"{name}{list(tensor.shape)}" for name, tensor in tensors)
        agree(comm, {"method": self._method, "parameters": shapes, **settings})
        self._log: MethodLog | None = None
        if same_start:
            start_alike(comm, (tensor for _, tensor in tensors), 0, "hvd_sketch.start")

    def step(self, closure: Callable[[], Any] | None = None, **keywords: Any) -> Any:
        """One local step and what the method adds to it; a closure is evaluated once, before."""
        if self._averaged:
            raise RuntimeError("step() inside average_model(): it would be lost when the block ends")
        self._collectives.occupation = f"step {self.stats.steps}"
        self.stats.steps += 1
        self.stats.dense_bytes += self._collectives.allreduce_bytes(4 * self._flat.layout.total)
        loss = super().step(closure, **keywords)
        if self._log is not None:
            self._log.end_step(self, self._collectives, self.stats)
        return loss

    @property
    def _method(self) -> str:
        """The name of the method's class: this one's own is that of the wrapped optimizer's."""
        return type(self).__mro__[2].__name__

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; it belongs to this rank. Save the model inside `average_model`."""
        return super().state_dict()

    def finish(self) -> None:
        """End training, on all ranks; what is under way comes to its end."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    @contextmanager
    def average_model(self) -> Iterator[torch.nn.Module]:
        """Collective: inside, the model holds the mean over the ranks, for evaluation and checkpoints.

        Floating-point buffers hold their mean as well, over the ranks where a value is not NaN;
        integer ones stay. Afterwards this rank's own model and buffers are back, to the bit.
        """
        tensors = [parameter.detach() for parameter in self._flat.parameters] + self._buffers
        own = [tensor.clone() for tensor in tensors]
        known = [buffer.isnan().logical_not_() for buffer in self._buffers]
        values = [buffer.nan_to_num(0.0, math.inf, -math.inf) for buffer in self._buffers]
        model, *means = self._mean(self._contribution(), *values, *known)
        buffers = [mean.div_(share) for mean, share in zip(means[: len(values)], means[len(values) :], strict=True)]
        self._live.vector.copy_(model)
        torch._foreach_copy_(tensors, [*self._live.views, *buffers])
        self._averaged = True
        try:
            yield self.model
        finally:
            self._averaged = False
            torch._foreach_copy_(tensors, own)

    def consensus_distance(self) -> float:
        """Collective: the root mean square over the ranks of a model's distance to the mean model."""
        model = self._contribution().clone()
        (mean,) = self._mean(model)
        squared = torch.linalg.vector_norm(model - mean).square().reshape(1)
        return float(self._mean(squared)[0].sqrt())

    def _contribution(self) -> Tensor:
        """What this rank adds to the mean model: its parameters."""
        self._flat.read(self._live)
        return self._live.vector

    def _mean(self, *tensors: Tensor) -> list[Tensor]:
        """Collective: the mean over the ranks of each tensor, where the model's vector is kept."""
        device, dtype = self._flat.device, self._flat.dtype
        message = torch.cat([tensor.detach().reshape(-1).to(device, dtype) for tensor in tensors])
        self._average(message)
        parts = torch.split_with_sizes(message, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def _average(self, vector: Tensor) -> None:
        """Collective: replace ``vector`` by its mean over the ranks."""
        self._collectives.allreduce(vector, "hvd_sketch.mean")
        check_alike(self._collectives, wire.checksum(vector.view(torch.uint8)), "the mean of the models", "hvd_sketch")
        vector.div_(self._collectives.size)


def saved_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state, by name; the others (``persistent=False``) are a rank's own."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if (path := name.rpartition("."))[2] not in model.get_submodule(path[0])._non_persistent_buffers_set
    }
