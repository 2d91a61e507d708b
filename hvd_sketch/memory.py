"""What was not sent yet: error feedback, with momentum correction when asked for."""

from __future__ import annotations

import importlib
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import gpu
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.saved import Form
from hvd_sketch.settings import check_numbers
from hvd_sketch.sketch import CountSketch
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.places import Places


@dataclass(frozen=True)
class Momentum:
    """Momentum accumulated on each rank before the selection (momentum correction of DGC).

    Use it with an inner optimizer that has no momentum of its own. ``masking`` clears the
    momentum of a coordinate when it is sent (momentum factor masking); without it, sending
    everything (k = d) equals ordinary momentum SGD.
    """

    factor: float
    nesterov: bool = False
    masking: bool = True

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0.0 < self.factor < 1.0:
            raise ConfigurationError(f"momentum factor must be between 0 and 1, got {self.factor}")


class Memory:
    """Residual v and momentum u of one rank, float32, over the whole vector.

    With gradient g, clip factor c and momentum factor m (``m = 0``: plain error feedback)::

        u <- m u + c g                    v <- v + u          (heavy ball)
        u <- m (u + c g)                  v <- v + u + c g    (Nesterov)

    then v loses what was sent: ``sent + residual = computed``, to the last bit. Sent
    coordinates of the compressed part lose their u as well when masking is on; dense
    coordinates are sent in every step and keep it.
    Sources: Lin et al., "Deep Gradient Compression" (ICLR 2018); Ivkin et al., arXiv 1903.04488.
    """

    def __init__(self, total: int, device: torch.device, momentum: Momentum | None = None) -> None:
        self._momentum = momentum
        self._factor = momentum.factor if momentum else 0.0
        self.gain = 1.0 + self._factor if momentum and momentum.nesterov else 1.0
        self.residual = torch.zeros(total, dtype=torch.float32, device=device)
        self.velocity = torch.zeros_like(self.residual) if momentum else None
        self._marked: list[Tensor] = []

    def part(self, where: slice) -> Memory:
        """The memory of a part of the vector: the same storage."""
        part = copy(self)
        part.residual = self.residual[where]
        part.velocity = None if self.velocity is None else self.velocity[where]
        return part

    def version(self) -> tuple[int, ...]:
        """Numbers that change with every write by PyTorch, by whomever; not with those of the native kernel."""
        return self.residual._version, 0 if self.velocity is None else self.velocity._version

    def sketch_carried(self, sketch: CountSketch) -> None:
        """Add what is carried into this step, ``v + m u``, to a sketch of the first coordinates."""
        dim = sketch.geometry.dim
        sketch.add(self.residual[:dim])
        if self.velocity is not None:
            sketch.add(self.velocity[:dim], scale=self._factor)

    def computed(
        self, gradient: Tensor, clip: float | Tensor, where: slice | Places, into: Tensor | None = None
    ) -> Tensor:
        """The new v at ``where``, without changing the memory: what could be sent now; a new tensor or ``into``."""
        result = torch.mul(_at(gradient, where), self.gain * clip, out=into).add_(_at(self.residual, where))
        if self.velocity is not None:
            result += _at(self.velocity, where) * self._factor
        return result

    def absorb(self, gradient: Tensor, clip: float | Tensor) -> None:
        """Take the gradient in: the step's new u and v, nothing sent yet."""
        _add(self.residual, gradient, self.gain, clip)
        if self.velocity is None:
            return
        self.residual.add_(self.velocity, alpha=self._factor)
        nesterov = self._momentum is not None and self._momentum.nesterov
        _add(self.velocity.mul_(self._factor), gradient, self._factor if nesterov else 1.0, clip)

    def advance(
        self, gradient: Tensor, clip: float | Tensor, sketch: CountSketch, chosen: Chosen, left: Tensor
    ) -> None:
        """`absorb`, `keep` what is left of what was chosen to be sent, and `sketch_carried` into the next step.

        In one pass, of the sketch's coordinates, where there is no momentum and the host knows the factor; the others
        are left to be kept.
        """
        if self.velocity is None and not isinstance(clip, Tensor):
            dim = sketch.geometry.dim
            sketch.add_advanced(self.residual[:dim], gradient[:dim], self.gain * clip, chosen, left)
            return
        self.absorb(gradient, clip)
        self.keep(chosen, left, mask=True)
        self.sketch_carried(sketch)

    def keep(self, where: slice | Places, left: Tensor | float, *, mask: bool) -> None:
        """Leave ``left`` behind of what was sent; ``mask`` marks coordinates open to masking."""
        _put(self.residual, where, left)
        if mask and self._momentum is not None and self._momentum.masking and self.velocity is not None:
            _put(self.velocity, where, 0.0)

    def mark(self) -> None:
        """Remember what there is for `go_back`, in as much memory again."""
        vectors = [self.residual] if self.velocity is None else [self.residual, self.velocity]
        if not self._marked:
            self._marked = [torch.empty_like(vector) for vector in vectors]
        torch._foreach_copy_(self._marked, vectors)

    def go_back(self) -> None:
        """To what there was at the last `mark`."""
        self.residual.copy_(self._marked[0])
        if self.velocity is not None:
            self.velocity.copy_(self._marked[1])

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors of this rank."""
        state = {"residual": self.residual.clone()}
        if self.velocity is not None:
            state["velocity"] = self.velocity.clone()
        return state

    def state_form(self) -> Form:
        """What a state that can be loaded looks like; see `hvd_sketch.saved`."""
        form = {"residual": self.residual}
        return form if self.velocity is None else {**form, "velocity": self.velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned on this rank, of the form `state_form`."""
        self.residual.copy_(state["residual"])
        if self.velocity is not None:
            self.velocity.copy_(state["velocity"])

    def reset(self) -> None:
        """Forget everything."""
        self.residual.zero_()
        if self.velocity is not None:
            self.velocity.zero_()


def _add(values: Tensor, gradient: Tensor, gain: float, clip: float | Tensor) -> None:
    """``values += gain * clip * gradient``; the product is not rounded before it is added."""
    if not isinstance(clip, Tensor):
        values.add_(gradient, alpha=gain * clip)
    elif gpu.serves(values):
        importlib.import_module("hvd_sketch.memory_cuda").add(values, gradient, gain, clip)  # with Triton
    else:
        values.add_(gradient * (gain * clip))


def _at(values: Tensor, where: slice | Places) -> Tensor:
    return values[where] if isinstance(where, slice) else where.at(values)


def _put(values: Tensor, where: slice | Places, left: Tensor | float) -> None:
    if isinstance(where, slice):
        values[where] = left
    else:
        where.put(values, left)
