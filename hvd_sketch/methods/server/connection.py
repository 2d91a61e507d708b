"""How a server and its workers find each other: the only collective part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch.comm import Communicator, as_communicator
from hvd_sketch.compressors import Compression, Sparsifier
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.agreement import agree
from hvd_sketch.layout import Layout
from hvd_sketch.methods.displacement import layout_rule
from hvd_sketch.methods.flat import FlatParameters, LayoutRule, whole
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.engine import Engine
from hvd_sketch.methods.server.line import Line
from hvd_sketch.methods.server.log import Event, Happened, Log
from hvd_sketch.methods.server.place import Place, place
from hvd_sketch.methods.server.polyline import Polyline, PolylineCode
from hvd_sketch.methods.server.rules.base import Rule
from hvd_sketch.methods.server.sparse_codes import sparse_code
from hvd_sketch.methods.server.store import Store
from hvd_sketch.methods.server.validation import Served


@dataclass(frozen=True)
class ServerSetting:
    """What server and workers agree on, but for ``patience`` and ``restarts``, which are each rank's own."""

    method: str
    server: int = 0
    works: bool = False
    up: Any = Compression.none
    down: Any = Compression.none
    patience: float = 60.0
    restarts: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.patience < math.inf:
            raise ConfigurationError(
                f"{self.method}: patience must be a positive number of seconds, got {self.patience}"
            )
        if self.restarts < 0:
            raise ConfigurationError(f"{self.method}: restarts must be at least 0, got {self.restarts}")

    @property
    def layout(self) -> LayoutRule:
        """How the parameters become one vector; both codes must ask for the same."""
        rules = [layout_rule(code) for code in (self.up, self.down) if isinstance(code, Sparsifier)]

        def lay_out(named_parameters: Any) -> Layout:
            named = list(named_parameters)
            layouts = [rule(named) for rule in rules]
            if any(layout != layouts[0] for layout in layouts):
                raise ConfigurationError(
                    f"{self.method}: up and down leave different parameters whole; give both the same dense_below "
                    "and exclude"
                )
            return layouts[0] if layouts else whole(named)

        return lay_out

    def code(self, name: str, parameters: FlatParameters) -> Code:
        """The code that ``up`` or ``down`` asks for.

        Raises:
            ConfigurationError: when it is none for a server.
        """
        compression, layout = getattr(self, name), parameters.layout
        if compression is Compression.none:
            return Whole(layout.total, parameters.dtype)
        if isinstance(compression, Polyline):
            return PolylineCode(compression, layout.total)
        if isinstance(compression, Sparsifier):
            return sparse_code(compression, layout)
        raise ConfigurationError(
            f"{self.method}: {name} must be Compression.none, topk(), sharded() or stride(), or a Polyline, "
            f"got {compression!r}"
        )

    def agreed(self, parameters: FlatParameters, model: torch.nn.Module) -> dict[str, str]:
        """What must be equal on all ranks."""
        buffers = " ".join(f"{name}{list(buffer.shape)}" for name, buffer in sorted(model.named_buffers()))
        return {
            "method": self.method,
            "server": f"server={self.server} server_works={self.works}",
            "compression": f"up={self.up!r} down={self.down!r}",
            "parameters": f"{parameters.layout.describe()} {parameters.dtype}",
            "buffers": buffers,
        }


class Connection(NamedTuple):
    """One rank's end."""

    engine: Engine
    up: Code
    down: Code | None


def connect(
    setting: ServerSetting,
    parameters: FlatParameters,
    model: torch.nn.Module,
    comm: Any,
    rule: Rule,
    *,
    samples: int,
    log: Path | str | None,
    on_change: Callable[[int], None] | None,
) -> Connection:
    """Collective: agree on the settings, share the server's buffers, and be ready.

    In a process that replaces a lost worker nothing is collective, and buffers stay its own.

    Args:
        setting: what is agreed on.
        parameters: that train, of ``model``.
        model: the server's is what all begin with.
        comm: an mpi4py intracommunicator, or a `Place`; see `place`.
        rule: of the server; those of other ranks do not matter.
        samples: of this worker.
        log: a file for the server to record what comes.
        on_change: see `hvd_sketch.methods.server.serving.Serving`.

    Raises:
        ConfigurationError: for what cannot work.
        RankMismatchError: alike on all ranks, when they differ.
    """
    here = place(comm)
    if not 0 <= setting.server < here.size:
        raise ConfigurationError(
            f"{setting.method}: server must be a rank below {here.size}, got {setting.server}; start more ranks"
        )
    if here.size == 1 and not setting.works:
        raise ConfigurationError(
            f"{setting.method}: a single rank cannot be a server without workers; start more ranks, or let it do "
            "both with server_works=True"
        )
    if samples < 1:
        raise ConfigurationError(f"{setting.method}: a worker's samples must be at least 1, got {samples}")
    up, down = setting.code("up", parameters), setting.code("down", parameters)
    differences = None if isinstance(down, Whole) else down
    counts = _agree(setting, parameters, model, here, samples) if here.way is None else {}
    store = None
    if here.rank == setting.server:
        store = _store(Served(parameters.layout, model, counts), parameters, rule, up, differences, log)
    nbytes = max(code.most_bytes for code in (up, down, Whole(parameters.layout.total, parameters.dtype)))
    line = Line(here, nbytes=nbytes, patience=setting.patience, server=setting.server)
    engine = Engine(
        line,
        store,
        works=setting.works,
        patience=setting.patience,
        restarts=setting.restarts,
        on_change=on_change,
    )
    return Connection(engine, up, differences)


def _agree(
    setting: ServerSetting, parameters: FlatParameters, model: torch.nn.Module, here: Place, samples: int
) -> dict[int, int]:
    """Collective: the workers' samples, by rank."""
    collectives = as_communicator(here.comm)
    agree(collectives, setting.agreed(parameters, model), _name)
    _share_buffers(model, collectives, setting.server)
    counts = dict(enumerate(collectives.allgather_object(samples, _name("samples"))))
    if not setting.works:
        del counts[setting.server]
    return counts


def _store(
    served: Served, parameters: FlatParameters, rule: Rule, up: Code, down: Code | None, log: Path | str | None
) -> Store:
    start = parameters.new()
    parameters.read(start)
    if log is None:
        return Store(start.vector, rule, served, up=up, down=down)
    record = Log(log).write
    record(Event(Happened.START, payload=start.vector.view(torch.uint8)))
    return Store(start.vector, rule, served, up=up, down=down, record=record)


def _share_buffers(model: torch.nn.Module, comm: Communicator, server: int) -> None:
    for name, buffer in sorted(model.named_buffers()):
        value: Tensor = buffer.detach().contiguous()
        comm.broadcast(value, server, _name(name))
        buffer.detach().copy_(value)


def _name(what: str) -> str:
    return f"hvd_sketch.server.{what}"
