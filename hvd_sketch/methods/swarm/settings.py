"""How a swarm trains, checked once."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.swarm.lattice import Lattice
from hvd_sketch.methods.swarm.peers import OnLost
from hvd_sketch.settings import check_numbers


@dataclass(frozen=True)
class Geometric:
    """A geometrically distributed number of local steps, at least 1, ``mean`` on average.

    The distribution that the convergence proof of SwarmSGD assumes.
    """

    mean: float

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 1.0 <= self.mean < math.inf:
            raise ConfigurationError(f"Geometric mean must be at least 1 step, got {self.mean}")

    def draw(self, generator: random.Random) -> int:
        """The next number of steps."""
        if self.mean == 1.0:
            return 1
        return 1 + int(math.log(1.0 - generator.random()) / math.log1p(-1.0 / self.mean))


class SwarmOptions(TypedDict, total=False):
    """The keywords of `SwarmSGD` that make `Settings`."""

    local_steps: int | Geometric
    quantization: Lattice | None
    blocking: bool
    seed: int
    patience: float
    on_lost: OnLost


@dataclass(frozen=True)
class Settings:
    """How a swarm meets; all but ``patience`` and ``on_lost`` equal on all ranks."""

    local_steps: int | Geometric = 1
    quantization: Lattice | None = None
    blocking: bool = False
    seed: int = 0
    patience: float = 60.0
    on_lost: OnLost = "raise"

    def __post_init__(self) -> None:
        check_numbers(self)
        steps: Any = self.local_steps
        whole = isinstance(steps, Real) and float(steps).is_integer()
        if not isinstance(steps, Geometric) and not (whole and steps >= 1):
            raise ConfigurationError(f"local_steps must be a whole number of at least 1 or a Geometric, got {steps!r}")
        if self.quantization is not None and not isinstance(self.quantization, Lattice):
            raise ConfigurationError(f"quantization must be a Lattice or None, got {self.quantization!r}")
        if not 0.0 < self.patience < math.inf:
            raise ConfigurationError(f"patience must be a positive number of seconds, got {self.patience}")
        if self.on_lost not in ("raise", "continue"):
            raise ConfigurationError(f"on_lost must be 'raise' or 'continue', got {self.on_lost!r}")

    def agreed(self) -> dict[str, str]:
        """What must be equal on all ranks."""
        names = ("local_steps", "quantization", "blocking", "seed")
        return {name: str(getattr(self, name)) for name in names}

    def steps(self, generator: random.Random) -> int:
        """Local steps until the next meeting."""
        return self.local_steps.draw(generator) if isinstance(self.local_steps, Geometric) else self.local_steps
