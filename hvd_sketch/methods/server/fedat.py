"""`FedAT`: rounds within tiers of equally fast workers, the tiers asynchronous to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch

from hvd_sketch.compressors import Compression, Sparsifier
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.server.optimizer import AsyncSGD
from hvd_sketch.methods.server.polyline import Polyline
from hvd_sketch.methods.server.rules.tiers import TierOptions, Tiers
from hvd_sketch.methods.server.settings import ServerOptions


class FedATOptions(ServerOptions, TierOptions, total=False):
    """Keywords of `FedAT`."""

    samples: int
    proximal: float


class FedAT(AsyncSGD):
    """Federated learning with asynchronous tiers.

    Workers are put into M tiers by how long they take to answer, the fastest first. In a round of tier
    m some of its workers get the model x, take ``period`` steps each with the proximal term
    ``λ (v - x)`` in the gradient, and send the model v_k that they arrived at. When all have answered,
    with n_k the samples of worker k and T_m the rounds of tier m so far::

        w_m <- sum of n_k v_k / sum of n_k          T_m <- T_m + 1
        x   <- sum over m of a_m w_m                a_m = T_(M+1-m) / sum of T

    and the tier goes on at once. The mirrored counts give a slow tier the weight of a fast one's rounds.
    **That is a bias**: the slow are over-weighted as soon as speeds differ by more than the data
    sizes. ``weights="samples"`` weighs by the tiers' samples, ``"uniform"`` all alike.

    What the paper leaves open, here:

    * Tiers are ordered by latency, measured from sending the model to receiving the answer: at
      first in one round in which all workers wait for the slowest, then, with ``retier``, from
      moving averages. A worker changes its tier between two rounds; w_m and T_m stay with the tier.
    * Tiers that have not reported yet weigh nothing, and the others are mirrored among themselves.
      ``published`` lets the formula stand: then nothing of the fastest tier's first round reaches x.
    * A round ends with those that answered; one that nobody answered is void. What a lost worker
      sends later counts in its tier's present round.
    * A tier that nobody is left of keeps its model and weight for ``forget`` more rounds of the others.

    Sent: 16 bytes and the code, up and down. Differences are coded, to what the worker was sent on the
    way up, and to what it was sent last on the way down, so numbers are small and the code's error
    never adds up. Memory of the server: x, one model a tier and one a worker.
    Source: Chai et al., "FedAT" (SC 2021), arXiv 2010.05958.

    Args:
        optimizer: takes the local steps.
        model: what it trains; the server's is what all begin with.
        period: local steps of a round.
        tiers: M, or the ranks of each tier, the fastest first.
        clients: workers of a tier that a round asks, drawn at random; None for all.
        samples: how many this worker has.
        proximal: λ.
        code: a `Polyline`, or a compressor of `AsyncSGD`, both ways.
        weights: ``"mirror"``, ``"uniform"`` or ``"samples"``.
        published: see above.
        retier: rounds of all tiers together between two re-orderings; None for none.
        forget: see above.
        seed: of the choice of workers.
        comm, server, patience, restarts, log, on_change: see `AsyncSGD`.

    Raises:
        ConfigurationError: for settings that cannot work.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    _name = "FedAT"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        *,
        period: int,
        tiers: int | Sequence[Sequence[int]] = 5,
        code: Any = Polyline(4),  # noqa: B008 - frozen
        **options: Unpack[FedATOptions],
    ) -> None:
        if not (code is Compression.none or isinstance(code, (Polyline, Sparsifier))):
            raise ConfigurationError(
                f"FedAT: code must be a Polyline, or Compression.none, topk(), sharded() or stride(), got {code!r}"
            )
        others: dict[str, Any] = {"period": period, "proximal": 0.4, **options}
        self.tiers = Tiers(tiers, **{name: others.pop(name) for name in TierOptions.__annotations__ if name in others})
        super().__init__(optimizer, model, comm, rule=self.tiers, up=code, down=code, memory="none", **others)
