"""What a server makes of its log a second time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvd_sketch.compressors import Compression
from hvd_sketch.methods.flat import HOST, FlatParameters
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.log import read_log
from hvd_sketch.methods.server.rules.base import Rule
from hvd_sketch.methods.server.settings import Settings
from hvd_sketch.methods.server.store import Store
from hvd_sketch.methods.server.validation import Served


@torch.no_grad()
def replay(
    path: Path | str,
    model: torch.nn.Module,
    rule: Rule,
    samples: Mapping[int, int],
    state: dict[str, Any] | None = None,
    *,
    up: Any = Compression.none,
    down: Any = Compression.none,
) -> Store:
    """Let everything that a log tells happen again, without any communication.

    With the rule and the settings of the recorded server its model, version and counters come out to the
    bit; another rule shows what it would have made of the same pushes, though workers would then
    have sent others.

    Args:
        path: what ``log`` of `AsyncSGD`, `FedAT` or `ADSAGA` named.
        model: like the recorded one; has the last model afterwards.
        rule: new, of any settings.
        samples: of each worker, by rank; 1 where they do not matter.
        state: what the recorded server had loaded, ``memory_state_dict()["server"]`` of the run before, if it had.
        up, down: as recorded.

    Returns:
        the server's store: ``model`` (a vector), ``version`` and ``stats``.
    """
    settings = Settings(method="replay", up=up, down=down)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = FlatParameters(named, settings.layout(named.items()), HOST)
    sent = settings.code("down", parameters)
    start = parameters.new()
    store = Store(
        start.vector,
        rule,
        Served(parameters.layout, model, dict(samples)),
        up=settings.code("up", parameters),
        down=None if isinstance(sent, Whole) else sent,
    )
    if state is not None:
        store.load_state_dict(state)
    for event in read_log(path):
        store.repeat(event)
    parameters.write(start)
    return store
