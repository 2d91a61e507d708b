"""Methods of others to compare with, written from their papers: DeMo and SparseLoCo.

Both cut tensors into blocks, send the largest of each block to all ranks by allgather, and so count ``W - 1``
messages a rank. Positions take as few bits as their block needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.comm import Communicator
from hvd_sketch.mixing import cosines, largest_divisor


class Blocks:
    """A tensor of one shape, cut into blocks of ``(a, b)``, the largest divisors of its two sides up to 64."""

    def __init__(self, shape: Sequence[int]) -> None:
        numel = math.prod(shape)
        self._shape, self._rows = tuple(shape), shape[0] if len(shape) > 1 else 1
        self._cols = numel // self._rows
        self._a, self._b = largest_divisor(self._rows), largest_divisor(self._cols)
        self.numel = self._a * self._b
        self.count = numel // self.numel
        self.width = max(1, math.ceil(math.log2(self.numel)))
        """Bits of a position."""

    def split(self, tensor: Tensor) -> Tensor:
        """To shape ``(count, a b)``."""
        sides = self._rows // self._a, self._a, self._cols // self._b, self._b
        return tensor.reshape(sides).transpose(1, 2).reshape(self.count, self.numel)

    def join(self, blocks: Tensor) -> Tensor:
        """Back to the tensor's shape."""
        sides = self._rows // self._a, self._cols // self._b, self._a, self._b
        return blocks.reshape(sides).transpose(1, 2).reshape(self._shape)

    def mix(self, blocks: Tensor, *, inverse: bool = False) -> Tensor:
        """The two-dimensional DCT-II of every block, or its inverse."""
        rows, cols = (cosines(side).to(blocks.dtype) for side in (self._a, self._b))
        if inverse:
            rows, cols = rows.t(), cols.t()
        return (rows @ blocks.view(-1, self._a, self._b) @ cols.t()).reshape_as(blocks)

    def kept(self, share: float) -> int:
        """How many entries of a block a share of all is, at least one."""
        return min(self.numel, max(1, round(share * self.numel)))


class DeMo(torch.optim.Optimizer):
    """DeMo, arXiv 2411.19870: each rank keeps a momentum and sends its fastest components.

    With the momentum m_i, a DCT T of blocks, and the k largest coefficients of each::

        m_i <- 0.999 m_i + lr g_i        q_i = top_k(T m_i)        m_i <- m_i - T^-1 q_i
        x <- (1 - lr wd) x - lr sign(T^-1 mean_i q_i)

    Sent: half precision and a position for every coefficient, to all ranks.

    Args:
        optimizer: whose parameters, rates and weight decays are taken.
        comm: the ranks.
        ratio: dense bytes over bytes sent, from which k follows.
        decay: of the momentum.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, comm: Communicator, ratio: float, decay: float = 0.999
    ) -> None:
        super().__init__(optimizer.param_groups, {})
        self._comm, self._decay = comm, decay
        self._share = _bits_a_parameter(ratio, comm.size) / (12 + 16)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all ranks together."""
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        messages, cut = [], []
        for group, parameter in trained:
            blocks = Blocks(parameter.shape)
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.mul_(self._decay).add_(parameter.grad, alpha=group["lr"])
            coefficients = blocks.mix(blocks.split(momentum))
            positions = coefficients.abs().topk(blocks.kept(self._share)).indices
            values = coefficients.gather(1, positions).half()
            momentum.sub_(blocks.join(blocks.mix(_spread(blocks, positions, values), inverse=True)))
            messages.append((pack(positions, blocks.width), values.numpy().tobytes()))
            cut.append((blocks, positions.shape))
        told = exchange(self._comm, [part for message in messages for part in message])
        for number, ((group, parameter), (blocks, shape)) in enumerate(zip(trained, cut, strict=True)):
            total = torch.zeros(blocks.count, blocks.numel)
            for parts in told:
                positions = unpack(parts[2 * number], blocks.width, shape)
                values = torch.frombuffer(bytearray(parts[2 * number + 1]), dtype=torch.half).view(shape)
                total += _spread(blocks, positions, values)
            parameter.mul_(1.0 - group["lr"] * group.get("weight_decay", 0.0))
            parameter.sub_(blocks.join(blocks.mix(total, inverse=True)).sign_(), alpha=group["lr"])


class SparseLoCo(torch.optim.Optimizer):
    """SparseLoCo, arXiv 2508.15706: local steps, and sparse two-bit differences with error feedback.

    After H local steps of the user's optimizer from the common x to z_i, with the k largest of each block C::

        e_i <- 0.95 e_i + x - z_i        c_i = C(e_i)        e_i <- e_i - c_i        x <- x - mean_i c_i

    Sent: a position, a sign and one of two sizes for every entry, and two half-precision sizes a block (the means of
    the entries below and above the block's mean), to all ranks.

    Args:
        optimizer: takes the local steps.
        comm: the ranks.
        ratio: dense bytes over bytes sent, from which k follows.
        period: H.
        decay: of the error.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, comm: Communicator, ratio: float, period: int, decay: float = 0.95
    ) -> None:
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups
        self._inner, self._comm, self._period, self._decay, self._steps = optimizer, comm, period, decay, 0
        self._share = period * _bits_a_parameter(ratio, comm.size) / (12 + 2)
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._start = [parameter.detach().clone() for parameter in self._trained]
        self._errors = [torch.zeros_like(parameter) for parameter in self._trained]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A local step; every H of them the ranks meet."""
        self._inner.step()
        self._steps += 1
        if self._steps % self._period == 0:
            self._meet()

    def _meet(self) -> None:
        messages: list[bytes] = []
        for parameter, start, error in zip(self._trained, self._start, self._errors, strict=True):
            blocks = Blocks(parameter.shape)
            error.mul_(self._decay).add_(start - parameter)
            entries = blocks.split(error)
            positions = entries.abs().topk(blocks.kept(self._share)).indices
            chosen = entries.gather(1, positions)
            sizes, large = _two_sizes(chosen.abs())
            signs = (chosen < 0).long()
            error.sub_(blocks.join(_spread(blocks, positions, _valued(sizes, large, signs))))
            messages += [pack(positions, blocks.width), pack(2 * large + signs, 2), sizes.numpy().tobytes()]
        told = exchange(self._comm, messages)
        for number, (parameter, start) in enumerate(zip(self._trained, self._start, strict=True)):
            blocks = Blocks(parameter.shape)
            shape = blocks.count, blocks.kept(self._share)
            for parts in told:
                positions = unpack(parts[3 * number], blocks.width, shape)
                codes = unpack(parts[3 * number + 1], 2, shape)
                sizes = torch.frombuffer(bytearray(parts[3 * number + 2]), dtype=torch.half).view(-1, 2)
                mean = _spread(blocks, positions, _valued(sizes, codes // 2, codes % 2)) / self._comm.size
                start.sub_(blocks.join(mean))
            parameter.copy_(start)

    @contextmanager
    def average_model(self) -> Iterator[None]:
        """Inside, the parameters are the mean of the ranks'."""
        own = [parameter.detach().clone() for parameter in self._trained]
        for number, parameter in enumerate(self._trained):
            mean = parameter.detach().reshape(-1).clone()
            self._comm.allreduce(mean, f"average.{number}")
            parameter.data.copy_((mean / self._comm.size).view_as(parameter))
        yield
        for parameter, mine in zip(self._trained, own, strict=True):
            parameter.data.copy_(mine)


def pack(numbers: Tensor, width: int) -> bytes:
    """Non-negative integers in so many bits each."""
    bits = (numbers.reshape(-1, 1) >> torch.arange(width)) & 1
    return np.packbits(bits.to(torch.uint8).numpy()).tobytes()


def unpack(packed: bytes, width: int, shape: Sequence[int]) -> Tensor:
    """What `pack` was given."""
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=math.prod(shape) * width)
    return (torch.from_numpy(bits).long().view(-1, width) << torch.arange(width)).sum(1).view(*shape)


def exchange(comm: Communicator, parts: Sequence[bytes]) -> list[list[bytes]]:
    """Every rank's parts, by rank, which are as long on all of them."""
    mine = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
    rows = [row.numpy().tobytes() for row in comm.allgather(mine, "rivals")]
    stops = np.cumsum([0, *map(len, parts)])
    return [[row[start:stop] for start, stop in pairwise(stops)] for row in rows]


def _spread(blocks: Blocks, positions: Tensor, values: Tensor) -> Tensor:
    """Chosen entries at their places, zero elsewhere."""
    return torch.zeros(blocks.count, blocks.numel).scatter_(1, positions, values.float())


def _two_sizes(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Per block the means of what is below and above its mean, half precision, and which of them is above."""
    large = magnitudes > magnitudes.mean(1, keepdim=True)
    above = (magnitudes * large).sum(1) / large.sum(1).clamp(min=1)
    below = (magnitudes * ~large).sum(1) / (~large).sum(1).clamp(min=1)
    return torch.stack([below, above], dim=1).half(), large.long()


def _valued(sizes: Tensor, large: Tensor, signs: Tensor) -> Tensor:
    return sizes.float().gather(1, large) * (1 - 2 * signs)


def _bits_a_parameter(ratio: float, ranks: int) -> float:
    """That an allgather may have for every parameter, at this ratio to a dense allreduce in a ring."""
    return 2 * 32 / ratio / ranks
