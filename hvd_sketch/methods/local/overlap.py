"""Overlap Local-SGD: the exchange of the last round runs while the next local steps compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Pending
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.exchange.log import MethodLog
from hvd_sketch.methods.local.base import LocalSteps, Rhythm
from hvd_sketch.saved import Form
from hvd_sketch.settings import check_numbers


class AnchorOptions(TypedDict, total=False):
    """The keywords of `OverlapLocalSGD` that make an `Anchor`."""

    pull: float
    anchor_momentum: float


@dataclass(frozen=True)
class Anchor:
    """How local models and their anchor move towards each other."""

    pull: float = 0.6
    anchor_momentum: float = 0.7

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0.0 < self.pull <= 1.0 or not 0.0 <= self.anchor_momentum < 1.0:
            raise ConfigurationError(
                f"pull must be in (0, 1] and anchor_momentum in [0, 1), got {self.pull} and {self.anchor_momentum}"
            )


class OverlapLocalSGD(LocalSteps):
    """Local models are pulled towards an anchor that is one round old, so nobody waits for the network.

    After every H local steps of any optimizer, with this rank's model x_i and the anchor z, whose
    allreduce began one meeting ago and is waited for now::

        x_i <- (1 - p) x_i + p z
        a_i <- b a_i + (z - x_i)                in units of the update
        z   <- mean_i (z - a_i)                 begins; the next H steps run meanwhile

    Without anchor momentum (b = 0) the anchor is the mean of the pulled-back models. The authors
    keep ``a / lr``; in units of the update a change of the learning rate needs no care. Under
    Horovod the exchange runs in its thread; under mpi4py MPI is called once a step to move it on.

    Sent: the model (float32, or float64 when any parameter is) and 47 numbers, among them a digest of the last anchor,
    in one allreduce, once every H steps. State: three vectors of the model's size.
    Source: Wang, Liang, Joshi (ICASSP 2020), arXiv 2002.09539.

    Args:
        optimizer: takes the local steps; any, its state stays on its rank.
        model: what it trains.
        comm: an mpi4py communicator or one of ours; Horovod where it is installed if None.
        period: H, in steps.
        clip_norm: each gradient is scaled down to this L2 norm before the step; None to leave it.
        same_start: begin with rank 0's parameters and saved buffers on every rank.
        pull: p, above 0 to 1; 0.6 when not given.
        anchor_momentum: b, 0 for none; 0.7 when not given.

    Raises:
        ConfigurationError: for settings out of range.
        RankMismatchError: alike on all ranks, when models or settings differ, or an anchor was damaged on its way.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        *,
        period: int = 8,
        clip_norm: float | None = None,
        same_start: bool = True,
        **anchor: Unpack[AnchorOptions],
    ) -> None:
        settings = Anchor(**anchor)
        rhythm = Rhythm(period=period, clip_norm=clip_norm, same_start=same_start)
        super().__init__(optimizer, model, comm, rhythm, {"anchor": str(settings)})
        self._pull, self._factor = settings.pull, settings.anchor_momentum
        self._log = MethodLog(f"OverlapLocalSGD, in every {period} steps")
        start = self._present().vector
        self._message = torch.cat([start.new_zeros(wire.HEADER), start])
        self._velocity = torch.zeros_like(self._anchor)
        self._pending: Pending | None = None
        self._arrived = self._anchor[:0]

    @property
    def _anchor(self) -> Tensor:
        """Behind its message's header."""
        return self._message[wire.HEADER :]

    def advance(self, **keywords: Any) -> None:
        if self._pending is not None:
            self._pending.poll()
        super().advance(**keywords)

    def _meet(self) -> None:
        self._arrive()
        local, anchor = self._live.vector, self._anchor
        self._flat.read(self._live)
        local.lerp_(anchor, self._pull)
        self._flat.write(self._live)
        self._velocity.mul_(self._factor).add_(anchor).sub_(local)
        anchor.sub_(self._velocity).div_(self._collectives.size)
        wire.write_header(self._message)
        wire.write_digest(self._message[wire.DIGEST], self._arrived)
        self._pending = self._collectives.start_allreduce(self._message, "hvd_sketch.anchor", in_turn=False)

    def finish(self) -> None:
        """As for every method: wait for the anchor that is on its way."""
        self._arrive()

    def _arrive(self) -> None:
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        self._arrived = wire.fold(self._anchor)
        if not wire.read_header(self._message).agreed:
            raise RankMismatchError(
                "OverlapLocalSGD: the last anchor but one did not come alike to all ranks: a message was damaged on "
                "its way; look at the network, and go on from a checkpoint"
            )

    def restart(self) -> None:
        super().restart()
        self._arrive()
        self._anchor.copy_(self._present().vector)
        self._velocity.zero_()
        self._arrived = self._anchor[:0]

    def _own_state(self) -> dict[str, Any]:
        self._arrive()
        return {"anchor": self._anchor.clone(), "velocity": self._velocity.clone()}

    def _own_form(self) -> dict[str, Form]:
        return {"anchor": self._anchor, "velocity": self._velocity}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self._arrive()
        self._anchor.copy_(state["anchor"])
        self._arrived = self._anchor[:0]
        self._velocity.copy_(state["velocity"])
