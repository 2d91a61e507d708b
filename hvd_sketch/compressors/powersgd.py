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
from hvd_sketch.exchange.coarse import Coarse, sum_coarsely
from hvd_sketch.exchange.intake import Factor, Finite
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
        factor_bits: of every number of the factors and of what is sent whole, 32, or 4 or 8 as in
            `CoarsePowerSGDExchange`.
    """

    rank: int = 2
    start_step: int = 10
    seed: int = 0
    dense_below: int | None = 1024
    factor_bits: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigurationError(f"rank must be at least 1, got {self.rank}")
        if self.start_step < 0:
            raise ConfigurationError(f"start_step must be at least 0, got {self.start_step}")
        if self.factor_bits not in (4, 8, 32):
            raise ConfigurationError(f"factor_bits must be 4, 8 or 32, got {self.factor_bits}")

    def is_dense(self, name: str, parameter: Tensor) -> bool:
        """Also true of a matrix that the product of two factors would not shrink."""
        if parameter.dim() < 2 or super().is_dense(name, parameter):
            return True
        n, m = matrix_shape(tuple(parameter.shape))
        return self.rank * (n + m) >= n * m

    @property
    def wants_whole_tensors(self) -> bool:
        """Factors of a matrix are smaller than those of its parts together."""
        return True

    def plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        """The rank, from ``start_step`` on."""
        return None if step < self.start_step else self.rank

    def build(self, setting: Setting) -> Exchange:
        """A `PowerSGDExchange`, or one in few bits."""
        if self.factor_bits == 32:
            return PowerSGDExchange(setting, self.rank, self.seed)
        return CoarsePowerSGDExchange(setting, self.rank, self.seed, Coarse(self.factor_bits))


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
        self._dense_left: Tensor | float = 0.0
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
        if not self.sum_lefts(finite):
            return False
        with self.stats.phase("factor"), full_precision():
            self._projected()
        with self.stats.phase("exchange"):
            agreed = self.sum_rights()
        if not agreed:
            raise RankMismatchError(
                f"hvd_sketch: in step {self.step} the ranks made different bases from the same sum, seen on rank "
                f"{self.comm.rank} and all others; use one build of PyTorch and its linear algebra on all ranks"
            )
        self.memory.absorb(self.gradient, clip)
        self.memory.keep(dense, self._dense_left, mask=False)
        self.memory.keep(compressed, self._computed, mask=True)
        with self.stats.phase("factor"), full_precision():
            (update,) = self._expanded()
            if self.rounds.all_present:
                self._right.copy_(self._rights)
        lanes = self._first[self._first.numel() - self.layout.dense :].mul_(1.0 / self.divisor)
        factors = self._rights  # the left ones were compared in round 2
        self.hold(Part(compressed, update.mul_(1.0 / self.divisor), source=factors), Part(dense, lanes))
        return True

    def sum_lefts(self, finite: Finite) -> bool:
        """Round 1: sum the left factors and the dense part; what `Rounds.sum` says."""
        return self.rounds.sum(self._first, finite, "left")

    def sum_rights(self) -> bool:
        """Round 2: sum the right factors; whether all ranks have the same bases."""
        self.comm.allreduce(self._second, self.rounds.name_of("right"))
        return wire.read_header(self._second).agreed

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


class CoarsePowerSGDExchange(PowerSGDExchange):
    """The same with factors and dense part in few bits, column by column, and error feedback for their rounding.

    Sums are those of `sum_coarsely`: with B_i the right factor of rank i as it was received, and b_i what rank i, as
    an owner, rounded off the sum::

        Q = sum_i B_i - sum_i b_i                  M_i loses P (B_i - b_i)^T

    which is nothing lost; of the left factors only the basis counts, which is the same on all ranks. Beside them
    two headers travel in half precision.
    """

    def __init__(self, setting: Setting, rank: int, seed: int, code: Coarse) -> None:
        super().__init__(setting, rank, seed)
        self._code = code
        dense = torch.arange(self.layout.dense, device=setting.device) + self._lefts.numel()
        self._left_order = torch.cat([*(self._by_columns(each.left) for each in self._matrices), dense])
        self._right_order = torch.cat([dense[:0], *(self._by_columns(each.right) for each in self._matrices)])

    def _by_columns(self, where: slice) -> Tensor:
        return torch.arange(where.start, where.stop, device=self.gradient.device).view(-1, self._rank).t().flatten()

    def sum_lefts(self, finite: Finite) -> bool:
        """Round 1, behind its header."""
        header = torch.empty(wire.HEADER, dtype=torch.float16, device=self.gradient.device)
        if not self.rounds.sum(header, finite, "header"):
            return False
        mine = self._first[wire.HEADER :]
        with self.stats.phase("exchange"):
            total, left = self._sum(mine, self._left_order, "left")
        mine.copy_(total)
        self._dense_left = left[self._lefts.numel() :]
        return True

    def sum_rights(self) -> bool:
        """Round 2, behind its header; what is computed gets back what rounding left out of its projection."""
        header = self._second[: wire.HEADER].to(torch.float16)
        self.comm.allreduce(header, self.rounds.name_of("bases"))
        total, left = self._sum(self._rights, self._right_order, "right")
        self._rights.copy_(total)
        with full_precision():
            for matrix, local, basis in self._views(self._computed, self._lefts):
                local.addmm_(basis, left[matrix.right].view(-1, self._rank).t())
        return wire.read_header(header).agreed

    def _sum(self, mine: Tensor, order: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """The sum over the ranks, and what this rank's memory is to keep; exact where a rank has joined."""
        name, total, left = self.rounds.name_of(what), torch.empty_like(mine), torch.zeros_like(mine)
        if not self.rounds.all_present:
            self.comm.allreduce(total.copy_(mine), name)
            return total, left
        summed = sum_coarsely(mine[order], self._code, self.comm, name, self.rounds.unseal)
        total[order], left[order] = summed.total, mine[order] - summed.sent + summed.lost
        return total, left


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
