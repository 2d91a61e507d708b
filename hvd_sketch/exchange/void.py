"""What all ranks are told of the first step that a gradient which is not finite made void."""

from __future__ import annotations

import warnings

from torch import Tensor

from hvd_sketch.exchange.rounds import Rounds
from hvd_sketch.layout import Layout


def tell_void(rounds: Rounds, layout: Layout, gradient: Tensor, step: int) -> None:
    """Collective, after a void step: rank 0 warns, naming the first rank and parameter that caused it."""
    found = rounds.comm.allgather_object(_first_bad(layout, gradient), rounds.name_of("void"))
    culprits = [(rank, name) for rank, name in enumerate(found) if name is not None]
    if culprits and rounds.comm.rank == 0:
        rank, name = culprits[0]
        warnings.warn(
            f"hvd_sketch: step {step} is void on all ranks: the gradient of {name!r} on rank {rank} is not finite; "
            "stats.skipped counts such steps, of which only this first one is told",
            stacklevel=2,
        )


def _first_bad(layout: Layout, gradient: Tensor) -> str | None:
    """The name of the first parameter whose gradient on this rank is not finite."""
    parts = ((slot.name, gradient[slot.offset : slot.stop]) for slot in layout.slots)
    return next((name for name, part in parts if not bool(part.isfinite().all())), None)
