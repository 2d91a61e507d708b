"""CSER: errors are applied at once, on the rank that made them, and averaged away now and then."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.compressors.compression import Compression
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.methods.displacement import displacement_exchange, layout_rule
from hvd_sketch.methods.local.base import LocalSteps, Rhythm
from hvd_sketch.saved import Form


class CSER(LocalSteps):
    """Communication-efficient SGD with error reset.

    With this rank's model x_i, its error E_i in units of the update, the step Δ_i of any
    optimizer, and compressors C2 (gradients) and C1 (errors)::

        psync(V_i, C):    keep_i = C(V_i),   rest_i = V_i - keep_i
                          return mean_i keep_i + rest_i, rest_i

        d_i, r_i = psync(Δ_i, C2)                  every step
        x_i <- x_i - d_i,   E_i <- E_i - r_i
        D_i, s_i = psync(E_i, C1)                  every H steps
        x_i <- x_i - E_i + D_i,   E_i <- s_i

    So the mean model follows ``-mean_i Δ_i`` exactly, and ``x_i - E_i`` is the same on all ranks.
    The overall ratio is ``1 / (1 / R2 + 1 / (R1 H))``. By parameters:

    * ``gradients=None, period=1``: CSEA; ``gradients=None``: CSER-PL, partial local SGD;
    * ``gradients=None, errors=Compression.none``: local SGD;
    * both ``Compression.none``: SGD.

    The published compressor takes globally random blocks; ``Compression.stride`` is ours of that
    kind. Others work as well. Evaluate and save inside `average_model`.

    Sent: what C2 sends every step, what C1 sends every H steps. State: E_i, and three vectors for
    each of the two exchanges, where the parameters are.
    Source: Xie et al., "CSER: Communication-efficient SGD with Error Reset" (NeurIPS 2020),
    arXiv 2007.13221.

    Args:
        optimizer: takes the local steps; any, its state stays on its rank.
        model: what it trains.
        comm: an mpi4py communicator or one of ours; Horovod where it is installed if None.
        gradients: C2, a member of `Compression`, or None to send no steps. Its ``clip_norm`` (else
            that of ``errors``) clips every local gradient.
        errors: C1, a member of `Compression`; it must leave the same parameters whole as C2.
        period: H, in steps.
        same_start: begin with rank 0's parameters and saved buffers on every rank.

    Raises:
        ConfigurationError: for settings that cannot work.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        *,
        gradients: Any,
        errors: Any,
        period: int = 8,
        same_start: bool = True,
    ) -> None:
        main = errors if gradients is None or gradients is Compression.none else gradients
        settings = {"gradients": repr(gradients), "errors": repr(errors)}
        clip_norm, layout = getattr(main, "clip_norm", None), layout_rule(main)
        rhythm = Rhythm(period=period, clip_norm=clip_norm, same_start=same_start, layout=layout)
        super().__init__(optimizer, model, comm, rhythm, settings)
        self.gradient_exchange = None if gradients is None else self._exchange_of(gradients, "gradients")
        self.error_exchange = self._exchange_of(errors, "errors")
        self._errors = torch.zeros_like(self._live.vector)
        self._before = self._flat.new()

    def _exchange_of(self, compression: Any, name: str) -> Exchange:
        layout = self._flat.layout
        if compression is not Compression.none:
            found = layout_rule(compression)(zip((s.name for s in layout.slots), self._flat.parameters, strict=True))
            if found != layout:
                raise ConfigurationError(
                    f"CSER: {name} leaves other parameters whole than the other compressor; give both the same "
                    "dense_below and exclude"
                )
        exchange = displacement_exchange(compression, layout, self._collectives, self._flat.device)
        exchange.log.notes.append(f"CSER, its {name}")
        return exchange

    def advance(self, **keywords: Any) -> None:
        before, after = self._before.vector, self._live.vector
        self._flat.read(self._before)
        self._local_step(**keywords)
        self._flat.read(self._live)
        rest = torch.sub(before, after, out=after)
        if self.gradient_exchange is not None:
            with self._exchanging():
                update, rest = self._psync(self.gradient_exchange, rest)
            before.sub_(update)
        before.sub_(rest)
        self._errors.sub_(rest)
        self._steps += 1
        if self._steps % self._period == 0:
            with self._exchanging():
                self._meet()
        self._flat.write(self._before)

    def _meet(self) -> None:
        """Error reset, on the model in ``_before``."""
        update, rest = self._psync(self.error_exchange, self._errors)
        self._before.vector.sub_(self._errors).add_(update).add_(rest)
        self._errors.copy_(rest)

    def _psync(self, exchange: Exchange, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of what was kept, and this rank's rest; all is rest when some rank is not finite."""
        exchange.memory.reset()
        exchange.submit_all(vector)
        exchange.run()
        if math.isnan(float(exchange.update[0])):
            self.stats.skipped += 1
            return torch.zeros_like(vector), vector
        return exchange.update, exchange.in_model(exchange.memory.residual)

    def restart(self) -> None:
        super().restart()
        self._errors.zero_()
        for exchange in self._exchanges():
            exchange.reset()

    def _own_state(self) -> dict[str, Any]:
        exchanges = [exchange.state_dict() for exchange in self._exchanges()]
        return {"errors": self._errors.clone(), "exchanges": exchanges}

    def _own_form(self) -> dict[str, Form]:
        return {"errors": self._errors, "exchanges": [exchange.state_form() for exchange in self._exchanges()]}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self._errors.copy_(state["errors"])
        for exchange, saved in zip(self._exchanges(), state["exchanges"], strict=True):
            exchange.load_state_dict(saved)

    def _exchanges(self) -> list[Exchange]:
        exchanges = [self.gradient_exchange, self.error_exchange]
        return [exchange for exchange in exchanges if exchange is not None]
