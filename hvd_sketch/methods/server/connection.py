"""How a server and its workers find each other: the only collective part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm import Communicator, as_communicator
from hvd_sketch.comm.alike import check_alike
from hvd_sketch.comm.copies import majority, thrice
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.agreement import agree
from hvd_sketch.methods.flat import FlatParameters
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.engine import Engine
from hvd_sketch.methods.server.line import Line
from hvd_sketch.methods.server.log import Log
from hvd_sketch.methods.server.place import Place, place
from hvd_sketch.methods.server.rules.base import Rule
from hvd_sketch.methods.server.serving import Serving
from hvd_sketch.methods.server.settings import Settings
from hvd_sketch.methods.server.store import Store
from hvd_sketch.methods.server.validation import Served


class Connection(NamedTuple):
    """One rank's end."""

    engine: Engine
    up: Code
    down: Code | None


def connect(
    settings: Settings, parameters: FlatParameters, model: torch.nn.Module, comm: Any, rule: Rule
) -> Connection:
    """Collective: agree on the settings, share the server's buffers, and be ready.

    In a process that replaces a lost worker nothing is collective, and buffers stay its own.

    Args:
        settings: of this rank.
        parameters: that train, of ``model``.
        model: the server's is what all begin with.
        comm: an mpi4py intracommunicator, or a `Place`; see `place`.
        rule: of the server; those of other ranks do not matter.

    Raises:
        ConfigurationError: for what cannot work.
        RankMismatchError: alike on all ranks, when they differ.
    """
    here = place(comm)
    if not 0 <= settings.server < here.size:
        raise ConfigurationError(
            f"{settings.method}: server must be a rank below {here.size}, got {settings.server}; start more ranks"
        )
    if here.size == 1 and not settings.server_works:
        raise ConfigurationError(
            f"{settings.method}: a single rank cannot be a server without workers; start more ranks, or let it do "
            "both with server_works=True"
        )
    up, down = settings.code("up", parameters), settings.code("down", parameters)
    samples = _agree(settings, parameters, model, here) if here.way is None else {}
    nbytes = max(code.most_bytes for code in (up, down, Whole(parameters.layout.total, parameters.dtype)))
    line = Line(here, nbytes=nbytes, patience=settings.patience, server=settings.server)
    differences = None if isinstance(down, Whole) else down
    serving = None
    if here.rank == settings.server:
        start = parameters.new()
        parameters.read(start)
        served, record = Served(parameters.layout, model, samples), None if settings.log is None else Log(settings.log)
        store = Store(start.vector, rule, served, up=up, down=differences, log=record)
        serving = Serving(line, store, restarts=settings.restarts, on_change=settings.on_change)
    engine = Engine(line, serving, works=settings.server_works, patience=settings.patience)
    return Connection(engine, up, differences)


def _agree(settings: Settings, parameters: FlatParameters, model: torch.nn.Module, here: Place) -> dict[int, int]:
    """Collective: the workers' samples, by rank."""
    collectives = as_communicator(here.comm)
    agree(collectives, settings.agreed(parameters, model))
    _share_buffers(model, collectives, settings.server)
    own = torch.tensor([settings.samples], dtype=torch.int64, device="cpu")
    told = majority(collectives.allgather(thrice(own), _name("samples")).t().flatten().tolist())
    samples = dict(enumerate(told))
    if not settings.server_works:
        del samples[settings.server]
    for rank, count in samples.items():
        if count < 1:
            raise ConfigurationError(
                f"{settings.method}: samples, or components, of a worker must be at least 1, rank {rank} has {count}"
            )
    return samples


def _share_buffers(model: torch.nn.Module, comm: Communicator, server: int) -> None:
    for name, buffer in sorted(model.named_buffers()):
        value: Tensor = buffer.detach().contiguous()
        comm.broadcast(value, server, _name(name))
        check_alike(comm, wire.checksum(value.view(-1).view(torch.uint8)), f"the buffer {name!r}", _name(name))
        buffer.detach().copy_(value)


def _name(what: str) -> str:
    return f"hvd_sketch.server.{what}"
