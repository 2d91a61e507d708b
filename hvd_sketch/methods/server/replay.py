"""What a server makes of its log a second time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvd_sketch.compressors import Compression
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.flat import HOST, FlatParameters
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.log import Event, Happened, read_log
from hvd_sketch.methods.server.rules.base import Rule
from hvd_sketch.methods.server.settings import Settings
from hvd_sketch.methods.server.store import ProtocolError, Store
from hvd_sketch.methods.server.validation import Served
from hvd_sketch.saved import unfit


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

    Raises:
        ConfigurationError: for a file that is no log, or is that of another model, other codes or other ranks.
    """
    if not isinstance(rule, Rule):
        raise ConfigurationError(
            f"replay: rule must be one of hvd_sketch.methods.server, such as Mean(), got {rule!r}"
        )
    if not isinstance(samples, Mapping) or not samples or not all(map(_is_count, samples.values())):
        raise ConfigurationError(
            f"replay: samples must have a number of at least 1 for the rank of each worker, got {samples!r}"
        )
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
        problem = unfit(state, store.state_form())
        if problem is not None:
            raise ConfigurationError(f"replay: state: {problem}")
        store.load_state_dict(state)
    for event in read_log(path):
        _repeat(store, event, path)
    parameters.write(start)
    return store


def _repeat(store: Store, event: Event, path: Path | str) -> None:
    """Let an event happen.

    Raises:
        ConfigurationError: when it cannot have happened to such a server.
    """
    if event.what == Happened.START and event.payload.numel() != store.model.nbytes:
        raise ConfigurationError(
            f"replay: model has {store.model.nbytes} bytes of parameters that train, and that of {path} "
            f"{event.payload.numel()}; give one like it"
        )
    try:
        store.repeat(event)
    except ProtocolError as error:
        raise ConfigurationError(
            f"replay: {path} is of a server of other settings: of worker {event.worker}, {error}; give up, down and "
            "the ranks of samples as recorded"
        ) from error


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 1
