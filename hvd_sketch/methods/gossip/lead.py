"""LEAD: decentralised SGD without bias, sending compressed differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.gossip.base import Gossip, check_sgd, nonzero_rate
from hvd_sketch.methods.gossip.infnorm import InfNorm, InfNormCode
from hvd_sketch.settings import check_numbers


class DifferenceOptions(TypedDict, total=False):
    """The keywords of `LEAD` that make `Differences`."""

    quantization: InfNorm
    alpha: float
    gamma: float
    seed: int


@dataclass(frozen=True)
class Differences:
    """How `LEAD` sends differences, and how fast it takes them in."""

    quantization: InfNorm = InfNorm()  # noqa: RUF009 - frozen
    alpha: float = 0.5
    gamma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0.0 < self.alpha <= 1.0 or not 0.0 < self.gamma <= 2.0:
            raise ConfigurationError(
                f"LEAD needs 0 < alpha <= 1 and 0 < gamma <= 2, got {self.alpha} and {self.gamma}"
            )


class LEAD(Gossip):
    """Linearly convergent decentralised optimisation with compression, synchronous.

    With gradient g at x, learning rate eta, an unbiased quantiser Q and states H, Hw = A H and D,
    all zero at first; the first step is ``x <- x - eta g``, every later one::

        q  = Q(x - eta g - eta D - H)              sent to the neighbours
        qw = sum_j a_ij q_j
        D  <- D + gamma / (2 eta) (H + q - Hw - qw)
        H  <- H + alpha q         Hw <- Hw + alpha qw
        x  <- x - eta g - eta D

    D, which sums to zero over the ranks, learns how a rank's gradient at the optimum differs
    from the mean; so heterogeneous ranks meet at the optimum itself, linearly on strongly convex
    problems, and the quantised differences vanish. For deep networks there is no such proof.
    A gradient that is not finite counts as zero, and in ``stats.skipped``.

    State on every rank: H, Hw and D, the size of the model each. Sent to every neighbour: see
    `InfNorm`; float64 models are sent with float32 scales.
    Source: Liu, Li, Wang, Tang, Yan (ICLR 2021), arXiv 2007.00232.

    Args:
        optimizer: a ``torch.optim.SGD`` without momentum, one learning rate for all groups;
            weight decay is part of g.
        model: what it trains.
        comm: an mpi4py communicator or one of ours; Horovod where it is installed if None.
        graph: complete, ring, torus, hypercube, or a networkx graph over the ranks; the weights
            are Metropolis's.
        same_start: begin with rank 0's parameters and saved buffers on every rank.
        quantization: bits and block of Q; ``InfNorm()`` when not given.
        alpha: how fast H follows, 0.5 when not given; smaller for stronger compression.
        gamma: step of D, 1.0 when not given; with 2 bits that diverges and 0.5 does not (8 quadratics on a ring).
        seed: of the random rounding; every rank derives its own from it.

    Raises:
        ConfigurationError: for another optimizer, momentum, alpha outside (0, 1] or gamma outside
            (0, 2]; see also `DmSGD`. In `step`, for learning rates that differ or are 0.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        graph: Any = "ring",
        *,
        same_start: bool = True,
        **differences: Unpack[DifferenceOptions],
    ) -> None:
        check_sgd(optimizer, "LEAD")
        if any(group["momentum"] for group in optimizer.param_groups):
            raise ConfigurationError("LEAD has no momentum; use torch.optim.SGD without it")
        sent = Differences(**differences)
        settings = {"differences": str(sent)}
        super().__init__(optimizer, model, comm, graph, lazy=False, same_start=same_start, settings=settings)
        self._alpha, self._gamma = sent.alpha, sent.gamma
        count, seed = self._flat.layout.total, sent.seed * 2**20 + self._collectives.rank
        self._code = InfNormCode(sent.quantization, count, self._flat.dtype, seed)
        self._message = torch.empty(self._code.message_bytes, dtype=torch.uint8, device="cpu")
        self._gradient = self._flat.new()
        self._seen, self._seen_mixed, self._dual, self._sent, self._mixed, self._scratch = (
            torch.zeros(count, dtype=self._flat.dtype, device="cpu") for _ in range(6)
        )
        self._begun = False

    def advance(self, **keywords: Any) -> None:
        rate = self._rate()
        x = self._live.vector
        self._flat.read(self._live)
        self._read_gradient(self._gradient)
        x.add_(self._gradient.vector, alpha=-rate)
        if self._begun:
            self._exchange_difference(rate)
            x.add_(self._dual, alpha=-rate)
        self._begun = True
        self._flat.write(self._live)

    def _exchange_difference(self, rate: float) -> None:
        """From ``x - eta g`` in `_live`, one quantised exchange; advances D, H and Hw."""
        torch.sub(self._live.vector, self._seen, out=self._scratch).add_(self._dual, alpha=-rate)
        self._code.encode(self._scratch, self._message)
        rows = self._exchange(self._message)
        self._code.decode(self._message, self._sent)
        torch.mul(self._sent, self._own_weight, out=self._mixed)
        for weight, row in zip(self._weights, rows, strict=True):
            self._code.decode(row, self._scratch)
            self._mixed.add_(self._scratch, alpha=weight)
        step = self._gamma / (2.0 * rate)
        self._dual.add_(self._seen, alpha=step).sub_(self._seen_mixed, alpha=step)
        self._dual.add_(self._sent, alpha=step).sub_(self._mixed, alpha=step)
        self._seen.add_(self._sent, alpha=self._alpha)
        self._seen_mixed.add_(self._mixed, alpha=self._alpha)

    def _rate(self) -> float:
        rates = {nonzero_rate(group) for group in self.param_groups}
        if len(rates) > 1:
            raise ConfigurationError(f"LEAD needs one learning rate for all parameter groups, got {sorted(rates)}")
        return rates.pop()

    def restart(self) -> None:
        for state in (self._seen, self._seen_mixed, self._dual):
            state.zero_()
        self._begun = False
