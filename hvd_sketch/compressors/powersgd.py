"""PowerSGD: every matrix of the gradient as a product of two thin ones, by one step of power iteration."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import gpu, wire
from hvd_sketch.compressors.base import Compressor
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.exchange import Exchange, Part, Setting
from hvd_sketch.exchange.base import Factor, Finite
from hvd_sketch.gpu import Recorded
from hvd_sketch.layout import Layout
from hvd_sketch.precision import full_precision
from hvd_sketch.saved import Form


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter as a matrix: the first dimension by all others, as in the paper."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True, eq=False, kw_only=True)
class PowerSGD(Compressor):
    """Low-rank averaging, the strongest rival of sparse updates for matrices; see `PowerSGDExchange`.

    Matrices that a rank-r product would not shrink are sent whole.

    Attributes:
        rank: of the product that stands for each matrix; the compression ratio follows from it.
        start_step: steps before this one are dense.
        seed: of the first right factors; equal on all ranks.
        dense_below: 1024 in any case: vectors have no factors.
    """

    rank: int = 2
    start_step: int = 10
    seed: int = 0
    dense_below: int | None = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigurationError(f"rank must be at least 1, got {self.rank}")
        if self.start_step < 0:
            raise ConfigurationError(f"start_step must be at least 0, got {self.start_step}")

    def is_dense(self, name: str, parameter: Tensor) -> bool:
        """Also true of a matrix that the product of two factors would not shrink."""
        if parameter.dim() < 2 or super().is_dense(name, parameter):
            return True
        n, m = matrix_shape(tuple(parameter.shape))
        return self.rank * (n + m) >= n * m

    def plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        """The rank, from ``start_step`` on."""
        return None if step < self.start_step else self.rank

    def build(self, setting: Setting) -> Exchange:
        """A `PowerSGDExchange`."""
        return PowerSGDExchange(setting, self.rank, self.seed)


_MOST_COLUMNS_ON_GPU = 16


@dataclass(frozen=True)
class _Factors:
    """Places of one matrix in the vector, in the flat left factors and in the flat right ones."""

    shape: tuple[int, int]
    coordinates: slice
    left: slice
    right: slice


class PowerSGDExchange(Exchange):
    """Low-rank averaging with error feedback and warm start (arXiv 1905.13727, Algorithm 1).

    For each compressed matrix M_i (n by m, rank i's computed memory), with Q (m by r) kept from the
    step before, at first drawn from the seed::

        round 1   P = orthonormal basis of sum_i M_i Q        allreduce of all n r floats + dense part
        round 2   Q = sum_i M_i^T P                           allreduce of all m r floats
        update = P Q^T / W;   M_i loses P (M_i^T P)^T

    Each rank loses its own projection, so sent + residual = computed on every rank; hence the products are of full
    float32 precision, whatever ``torch.set_float32_matmul_precision`` allows. The ratio follows from the shapes:
    ``4 total / (4 (sum r (n + m) + dense))``.
    """

    def __init__(self, setting: Setting, rank: int, seed: int) -> None:
        super().__init__(setting)
        layout, device = setting.layout, setting.device
        self._rank, self._seed = rank, seed
        self._matrices = _places(layout, rank)
        lefts, rights = (self._matrices[-1].left.stop, self._matrices[-1].right.stop) if self._matrices else (0, 0)
        self._first = torch.zeros(wire.HEADER + lefts + layout.dense, dtype=torch.float32, device=device)
        self._second = torch.zeros(wire.HEADER + rights, dtype=torch.float32, device=device)
        self._right = torch.zeros(rights, dtype=torch.float32, device=device)
        self._computed = torch.zeros(layout.compressed, dtype=torch.float32, device=device)
        self._lefts = self._first[wire.HEADER : wire.HEADER + lefts]
        self._rights = self._second[wire.HEADER :]
        self._bases = torch.tensor(
            [(each.left.start, each.shape[0]) for each in self._matrices], dtype=torch.int64, device=device
        )
        self._multiplied = Recorded(self._multiply, device)
        self._projected = Recorded(self._project, device)
        self._expanded = Recorded(self._expand, device)
        self._draw_right()

    def _draw_right(self) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        self._right.copy_(torch.randn(self._right.numel(), generator=generator, dtype=torch.float32, device="cpu"))

    def send(self, plan: int, clip: Factor, finite: Finite) -> bool:
        """Round 1, whose message has the dense part too, and round 2."""
        compressed, dense = slice(0, self.layout.compressed), slice(self.layout.compressed, self.layout.total)
        with self.stats.phase("factor"), full_precision():
            self._multiplied(
                clip
                if isinstance(clip, Tensor)
                else torch.tensor(clip, dtype=torch.float32, device=self.gradient.device)
            )
        if not self.rounds.sum(self._first, finite, "left"):
            return False
        with self.stats.phase("factor"), full_precision():
            self._projected()
        with self.stats.phase("exchange"):
            self.comm.allreduce(self._second, self.rounds.name_of("right"))
        if not wire.read_header(self._second).agreed:
            raise RankMismatchError(
                f"hvd_sketch: in step {self.step} the ranks made different bases from the same sum, seen on rank "
                f"{self.comm.rank} and all others; use one build of PyTorch and its linear algebra on all ranks"
            )
        self.memory.absorb(self.gradient, clip)
        self.memory.keep(dense, 0.0, mask=False)
        self.memory.keep(compressed, self._computed, mask=True)
        with self.stats.phase("factor"), full_precision():
            (update,) = self._expanded()
            if self.rounds.all_present:
                self._right.copy_(self._rights)
        lanes = self._first[self._first.numel() - self.layout.dense :].mul_(1.0 / self.divisor)
        self.hold(Part(compressed, update.mul_(1.0 / self.divisor)), Part(dense, lanes))
        return True

    def _multiply(self, clip: Tensor) -> tuple[Tensor, ...]:
        """Round 1's message: the left factors of what is computed, and the dense part of it."""
        self.memory.computed(self.gradient, clip, slice(0, self.layout.compressed), self._computed)
        for matrix, computed, left in self._views(self._computed, self._lefts):
            torch.mm(computed, self._right[matrix.right].view(-1, self._rank), out=left)
        dense = slice(self.layout.compressed, self.layout.total)
        self._first[self._first.numel() - self.layout.dense :] = self.memory.computed(self.gradient, clip, dense)
        return ()

    def _project(self) -> tuple[Tensor, ...]:
        """Round 2's message: the right factors for the bases of the summed left ones; what is computed loses both."""
        self._orthonormalize()
        for matrix, local, left in self._views(self._computed, self._lefts):
            own = self._rights[matrix.right].view(-1, self._rank)
            torch.mm(local.t(), left, out=own)
            local.addmm_(left, own.t(), alpha=-1.0)
        wire.write_header(self._second)
        wire.write_digest(self._second[wire.DIGEST], self._lefts)
        return ()

    def _expand(self) -> tuple[Tensor, ...]:
        """The sum over the ranks, from its factors."""
        update = torch.empty_like(self._computed)
        for matrix, part, left in self._views(update, self._lefts):
            torch.mm(left, self._rights[matrix.right].view(-1, self._rank).t(), out=part)
        return (update,)

    def _orthonormalize(self) -> None:
        if gpu.serves(self._lefts) and self._rank <= _MOST_COLUMNS_ON_GPU:
            kernels = importlib.import_module("hvd_sketch.compressors.powersgd_cuda")  # with Triton
            kernels.orthonormalize(self._lefts, self._bases, self._rank)
            return
        for _, _, left in self._views(self._computed, self._lefts):
            left.copy_(torch.linalg.qr(left).Q)

    def _views(self, vector: Tensor, lefts: Tensor) -> Iterator[tuple[_Factors, Tensor, Tensor]]:
        """Each matrix, its part of a vector, and its left factor."""
        for matrix in self._matrices:
            yield matrix, vector[matrix.coordinates].view(matrix.shape), lefts[matrix.left].view(-1, self._rank)

    def reset(self) -> None:
        """Also draw the right factors anew."""
        super().reset()
        self._draw_right()

    def own_state(self) -> dict[str, Any]:
        """The right factors."""
        return {"right": self._right.clone()}

    def own_form(self) -> Form:
        """As many."""
        return {"right": self._right}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._right.copy_(state["right"])


def _places(layout: Layout, rank: int) -> list[_Factors]:
    places, left, right = [], 0, 0
    for slot in layout.slots:
        if slot.offset < layout.compressed:
            n, m = matrix_shape(slot.shape)
            places.append(
                _Factors(
                    (n, m),
                    slice(slot.offset, slot.stop),
                    slice(left, left + n * rank),
                    slice(right, right + m * rank),
                )
            )
            left, right = left + n * rank, right + m * rank
    return places
