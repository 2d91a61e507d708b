"""What users make with settings, and which of these are numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import torch

import hvd_sketch as hvd
from hvd_sketch import Compression
from hvd_sketch.methods import server, swarm
from hvd_sketch.methods.gossip.infnorm import InfNorm
from hvd_sketch.methods.server import attacks
from hvd_sketch.methods.swarm.lattice import Lattice
from hvd_sketch.schedules import base as schedules
from tests.support.training import net

Make = Callable[..., Any]

_COMPRESSORS = ("auto", "sketch", "topk", "sharded", "mixed", "stride", "sign", "powersgd")
_OUTCOMES = {"Stats", "ServerStats", "WorkerCounts", "SwarmStats", "Place", "Meeting", "Push"}
_ABSTRACT = {"Communicator", "Gathered", "Rule", "Local", "Omniscient"}
_FOUND = {getattr(module, name) for module in (hvd, server, swarm) for name in module.__all__}
_FOUND |= {each for each in vars(attacks).values() if inspect.isclass(each) and each.__module__ == attacks.__name__}
_CLASSES = {each for each in _FOUND if inspect.isclass(each) and not issubclass(each, Exception)}
PUBLIC: list[Make] = [
    *sorted((each for each in _CLASSES if each.__name__ not in _OUTCOMES | _ABSTRACT), key=lambda each: each.__name__),
    *(getattr(Compression, name) for name in _COMPRESSORS),
    *(schedules.constant, schedules.warmup, schedules.linear, schedules.exponential, schedules.per_epoch),
    *(InfNorm, Lattice, hvd.DistributedOptimizer, attacks.flip_labels, attacks.little_enough),
]


def numbers_of(make: Make) -> list[str]:
    """Arguments that are declared a number, or True or False, or also one of these."""
    return sorted({name for name, kinds in _declared(make) if kinds & {"bool", "int", "float"}})


def whole_numbers_of(make: Make) -> list[str]:
    """Those that are declared a whole number, and nothing else but None."""
    return sorted({name for name, kinds in _declared(make) if kinds - {"None"} == {"int"}})


def arguments_for(make: Make) -> dict[str, Any]:
    """All that it does not do without."""
    model = net()
    known = {
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "model": model,
        "comm": hvd.SingleProcess(),
        "gradients": Compression.none,
        "errors": Compression.none,
        "validators": [lambda model, number: 0.0],
        "ratios": [4.0],
        "validate": lambda model, number: 0.0,
        "honest": lambda: torch.zeros(2, 2),
        "labels": torch.tensor([0, 1]),
        "workers": 10,
        "bits": 8,
        "target": 0.5,
        "factor": 0.5,
        "on_lost": "keep",
    }
    declared = inspect.signature(make).parameters.values()
    named = [each for each in declared if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return {
        each.name: known.get(each.name, 2)
        for each in named
        if each.name in ("comm", "smoothness") or each.default is each.empty
    }


def _declared(make: Make) -> Iterator[tuple[str, set[str]]]:
    """The arguments and what they may be; those of bases as well, to which it hands on whatever it is given."""
    constructors = (
        [each.__dict__["__init__"] for each in inspect.getmro(make) if "__init__" in each.__dict__]
        if (inspect.isclass(make))
        else [make]
    )
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters.values()
        yield from ((each.name, _kinds(each.annotation)) for each in parameters)
        others = next((each for each in parameters if each.kind is each.VAR_KEYWORD), None)
        if others is None:
            return
        if str(others.annotation).startswith("Unpack"):
            (options,) = get_args(get_type_hints(constructor)[others.name])
            yield from ((name, _kinds(annotation)) for name, annotation in get_type_hints(options).items())
            return


def _kinds(annotation: Any) -> set[str]:
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return {kind.strip() for kind in text.split("|")}
