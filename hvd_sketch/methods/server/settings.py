"""How a rank takes part in training with a server, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, get_args

import torch
from torch import Tensor

from hvd_sketch.compressors import Compression, Sparsifier
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout
from hvd_sketch.methods.decentralized import saved_buffers
from hvd_sketch.methods.displacement import layout_rule
from hvd_sketch.methods.flat import FlatParameters, LayoutRule, whole
from hvd_sketch.methods.server.codes import Code, Whole
from hvd_sketch.methods.server.polyline import Polyline, PolylineCode
from hvd_sketch.methods.server.sparse_codes import sparse_code
from hvd_sketch.methods.server.worker import MemoryUse, Transform
from hvd_sketch.settings import check_numbers
from hvd_sketch.sparse import codec


class ServerOptions(TypedDict, total=False):
    """Keywords of all methods with a server; see `Settings`."""

    server: int
    patience: float
    restarts: int
    log: Path | str | None
    on_change: Callable[[int], None] | None


class AsyncOptions(ServerOptions, total=False):
    """Keywords of `AsyncSGD` that make `Settings`."""

    server_works: bool
    up: Any
    down: Any
    period: int
    memory: MemoryUse
    proximal: float
    samples: int
    outgoing: Sequence[Transform]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `AsyncSGD` explains; ``server``, ``server_works``, ``up`` and ``down`` must be equal on all ranks."""

    method: str
    server: int = 0
    server_works: bool = False
    up: Any = Compression.none
    down: Any = Compression.none
    period: int = 1
    memory: MemoryUse = "reset"
    proximal: float = 0.0
    samples: int = 1
    outgoing: Sequence[Transform] = ()
    patience: float = 60.0
    restarts: int = 0
    log: Path | str | None = None
    on_change: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        demands = {
            "period": (self.period >= 1, "at least 1 step"),
            "proximal": (0.0 <= self.proximal < math.inf, "at least 0"),
            "memory": (self.memory in get_args(MemoryUse), f"one of {get_args(MemoryUse)}"),
            "patience": (0.0 < self.patience < math.inf, "a positive number of seconds"),
            "restarts": (self.restarts >= 0, "at least 0"),
            "outgoing": (
                _are_functions(self.outgoing),
                "a list of functions of an update, such as [LocalNoise(1, 1)]",
            ),
            "on_change": (self.on_change is None or callable(self.on_change), "a function of the version, or None"),
            "log": (self.log is None or isinstance(self.log, (str, Path)), "the path of a file, or None"),
        }
        for name, (holds, demand) in demands.items():
            if not holds:
                raise ConfigurationError(f"{self.method}: {name} must be {demand}, got {getattr(self, name)!r}")

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

    @property
    def clip_norm(self) -> float:
        """The L2 norm that local gradients are scaled down to; infinite for none."""
        given = getattr(self.up, "clip_norm", None)
        return math.inf if given is None else float(given)

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
        others = " ".join(f"{name}{list(tensor.shape)}" for name, tensor in self.untrained(parameters, model).items())
        return {
            "method": self.method,
            "server": f"server={self.server} server_works={self.server_works}",
            "compression": f"up={self.up!r} down={self.down!r} sparse_code={codec.VERSION}",
            "parameters": f"{parameters.layout.describe()} {parameters.dtype}",
            "what does not train": others,
        }

    def untrained(self, parameters: FlatParameters, model: torch.nn.Module) -> dict[str, Tensor]:
        """Of a model that with which all begin beside the parameters that train: the others, and saved buffers."""
        trained = {slot.name for slot in parameters.layout.slots}
        others = {name: tensor for name, tensor in model.named_parameters() if name not in trained}
        return dict(sorted({**others, **saved_buffers(model)}.items()))


def _are_functions(given: Any) -> bool:
    return isinstance(given, Sequence) and all(map(callable, given))
