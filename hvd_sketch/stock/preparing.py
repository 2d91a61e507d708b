"""What has to be done to Horovod before an optimizer uses it, where a script imports Horovod by itself."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from hvd_sketch.compatibility import parameters_kept

_preparations: list[Callable[[], None]] = []


def prepared_by(preparation: Callable[[], None]) -> None:
    """From now on, do this before."""
    _preparations.append(preparation)


def prepare() -> None:
    """Do it, once Horovod is imported; called whenever a compressor is made."""
    if "horovod.torch" in sys.modules:
        for preparation in _preparations:
            preparation()


def _keep_parameters() -> None:
    """Let Horovod broadcast the state of our optimizers without touching parameters.

    A rank without a state makes one by a step, which decays its weights: those that rank 0 has just broadcast, in
    the order of Horovod's own examples.
    """
    horovod: Any = sys.modules["horovod.torch"]
    original = horovod.broadcast_optimizer_state
    if getattr(original, "__wrapped__", None) is not None:
        return

    @functools.wraps(original)
    def broadcast_optimizer_state(optimizer: Any, *arguments: Any, **keywords: Any) -> Any:
        if not hasattr(vars(optimizer).get("_compression"), "exchange"):
            return original(optimizer, *arguments, **keywords)
        with parameters_kept(optimizer):
            return original(optimizer, *arguments, **keywords)

    horovod.broadcast_optimizer_state = broadcast_optimizer_state


prepared_by(_keep_parameters)
