"""How a server and its workers find each other: the only collective part."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from hvd_sketch.comm import Communicator, as_communicator
from hvd_sketch.comm.copies import majority, thrice
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange.agreement import agree
from hvd_sketch.methods.flat import FlatParameters
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.engine import Engine
from hvd_sketch.methods.server.line import Line
from hvd_sketch.methods.server.log import Log
from hvd_sketch.methods.server.place import place
from hvd_sketch.methods.server.rules.base import Rule
from hvd_sketch.methods.server.serving import Serving
from hvd_sketch.methods.server.settings import Settings
from hvd_sketch.methods.server.store import Store
from hvd_sketch.methods.server.validation import Served
from hvd_sketch.methods.start import start_alike


class Connection(NamedTuple):
    """One rank's end."""

    engine: Engine
    up: Code
    down: Code | None


def connect(
    settings: Settings, parameters: FlatParameters, model: torch.nn.Module, comm: Any, rule: Rule
) -> Connection:
    """Collective: agree on the settings, share what the server's model has beside what trains, and be ready.

    In a process that replaces a lost worker nothing is collective, and what does not train stays its own.

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
    collectives = as_communicator(here.comm)
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
    samples = _agree(settings, parameters, model, collectives) if here.way is None else {}
    nbytes = max(code.most_bytes for code in (up, down, Whole(parameters.layout.total, parameters.dtype)))
    line = Line(here, nbytes=nbytes, patience=settings.patience, server=settings.server)
    differences = None if isinstance(down, Whole) else down
    serving, problem = None, None
    if here.rank == settings.server:
        try:
            store = _store(settings, parameters, Served(parameters.layout, model, samples), rule, up, differences)
            serving = Serving(line, store, restarts=settings.restarts, on_change=settings.on_change)
        except Exception as error:
            problem = error
    if here.way is None:
        _begin_together(settings, collectives, problem)
    engine = Engine(line, serving, works=settings.server_works, patience=settings.patience)
    return Connection(engine, up, differences)


def _store(
    settings: Settings, parameters: FlatParameters, served: Served, rule: Rule, up: Code, down: Code | None
) -> Store:
    """The server's model and its rule, which may refuse."""
    if not isinstance(rule, Rule):
        raise ConfigurationError(
            f"{settings.method}: rule must be one of hvd_sketch.methods.server, such as Mean(), got {rule!r}"
        )
    changing = [name for name, module in served.model.named_modules() if getattr(module, "track_running_stats", False)]
    if changing and not settings.server_works:
        warnings.warn(
            f"{settings.method}: rank {settings.server} serves and trains nothing, so the running statistics of its "
            f"{changing[0]!r} stay what they are, and its model is not to be evaluated with them; use GroupNorm, or "
            "take its buffers from a worker",
            RuntimeWarning,
            stacklevel=5,
        )
    start = parameters.new()
    parameters.read(start)
    log = None if settings.log is None else Log(settings.log)
    return Store(start.vector, rule, served, up=up, down=down, log=log)


def _begin_together(settings: Settings, comm: Communicator, problem: Exception | None) -> None:
    """Collective: raise on all ranks what keeps the server from beginning, which it alone finds out."""
    text = "" if problem is None else f"{settings.method}: the server, rank {comm.rank}, cannot begin: {problem!r}"
    text = str(problem) if isinstance(problem, ConfigurationError) else text
    told = comm.allgather_object(text, _name("begin"))[settings.server]
    if problem is not None:
        raise problem
    if told:
        raise ConfigurationError(told)


def _agree(
    settings: Settings, parameters: FlatParameters, model: torch.nn.Module, collectives: Communicator
) -> dict[int, int]:
    """Collective: the workers' samples, by rank."""
    agree(collectives, settings.agreed(parameters, model))
    start_alike(collectives, settings.untrained(parameters, model).values(), settings.server, _name("start"))
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


def _name(what: str) -> str:
    return f"hvd_sketch.server.{what}"
