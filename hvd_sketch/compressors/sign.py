"""Scaled sign: one bit a coordinate and one scale a tensor, on one way or on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hvd_sketch import bits, wire
from hvd_sketch.comm.base import Pending
from hvd_sketch.compressors.base import Compressor
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange, Part, Setting
from hvd_sketch.exchange.sparse import SparseExchange
from hvd_sketch.layout import Layout

_SCALE = torch.bfloat16


@dataclass(frozen=True, eq=False, kw_only=True)
class Sign(Compressor):
    """Scaled sign, a bit a coordinate; see `TwoWaySignExchange` and `OneWaySignExchange`.

    Attributes:
        both_ways: compress what owners send back as well, so that the bytes do not grow with the ranks.
        start_step: steps before this one are dense: for Adam long enough that its second moments are known.
        half: the dense part travels as float16, on more than 128 ranks as float32; what is rounded off stays in
            the memory.
    """

    both_ways: bool = True
    start_step: int = 0
    half: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_step < 0:
            raise ConfigurationError(f"start_step must be at least 0, got {self.start_step}")

    def plan(self, layout: Layout, step: int, ranks: int) -> int | None:
        """Bytes of the signs that a rank sends to each other one, from ``start_step`` on."""
        parts = ranks if self.both_ways else 1
        return None if step < self.start_step else bits.packed_bytes(-(-layout.compressed // parts), 1)

    def build(self, setting: Setting) -> Exchange:
        """The exchange of one way or of two."""
        dtype = torch.float16 if self.half else torch.float32
        return TwoWaySignExchange(setting, dtype) if self.both_ways else OneWaySignExchange(setting, dtype)


class OneWaySignExchange(SparseExchange):
    """Every rank's signs and scales by allgather, and their mean.

    With computed memory v_i on rank i, and for each tensor q of n_q coordinates::

        C(v)_q = (|v_q|_1 / n_q) sign(v_q)            c_i = C(v_i),   v_i loses c_i
        update = sum_i c_i / W

    where the sign of 0 counts as 1. A rank sends ``n / 8`` bytes and two a tensor to each of the others, which is
    ``64 / W`` times less than a dense exchange sends; the dense part in an allreduce. Source: error feedback for
    signSGD, Karimireddy et al. (ICML 2019), arXiv 1901.09847, whose experiments scale layer by layer.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(setting, dtype)
        compressed = setting.layout.compressed
        self._edges = [slot.offset for slot in setting.layout.slots if slot.offset < compressed] + [compressed]
        self._where = slice(0, compressed)

    def send_chosen(self, plan: int) -> list[Part]:
        """Allgather every rank's code, and sum what they stand for."""
        with self.stats.phase("select"):
            code, sent = _encode(self.memory.residual[self._where], self._edges, plan)
        with self.stats.phase("exchange"):
            pending = self.comm.start_allgather(wire.seal(code.unsqueeze(0))[0], self.rounds.name_of("signs"))
        with self.stats.phase("memory"):
            self.keep_rest(sent)
        with self.stats.phase("exchange"):
            gathered = self.rounds.unseal(pending.wait(), self.rounds.name_of("signs"))
        with self.stats.phase("memory"):
            update = self.update[self._where].zero_()
            for row in gathered:
                update += _decode(row, self._edges)
            return [Part(self._where, update.mul_(1.0 / self.divisor), source=gathered)]

    def keep_rest(self, sent: Tensor) -> None:
        """Keep the rest of the compressed part; momentum stays, for everything is sent in every step."""
        memory = self.memory.residual[self._where]
        self.stats.note_norms([torch.linalg.vector_norm(sent)], [torch.linalg.vector_norm(memory)])
        self.memory.keep(self._where, memory - sent, mask=False)


class TwoWaySignExchange(OneWaySignExchange):
    """Each coordinate has an owner, who receives signs, sums what they stand for, and sends the sum's to everybody.

    Coordinate i belongs to rank ``i mod W``. With C as in `OneWaySignExchange`, of an owner's tensors what it owns::

        up     c_i = C(v_i)                              alltoall;   v_i loses c_i, but for what it owns
        owner  s_j = v_j on shard j + sum_{i != j} c_i   its own part needs no compression
        down   q_j = C(s_j)                              allgather;  v_j on shard j becomes s_j - q_j
        update = (q_0 … q_{W-1}) / W

    The server's error is in its owner's memory, as in `hvd_sketch.compressors.sharded`. Up and down together are
    ``2 (W-1)/W (n / 8 + 2 W tensors)`` bytes, up to 32 times less than a dense exchange. Sources: two ways with an
    error on each, 1-bit Adam, Tang et al. (ICML 2021), arXiv 2102.02888; with a scale for each tensor, Zheng et al.
    (NeurIPS 2019), arXiv 1905.10936.
    """

    @property
    def owned(self) -> slice:
        """This rank's shard."""
        return slice(self.comm.rank, self.layout.compressed, self.comm.size)

    def send_chosen(self, plan: int) -> list[Part]:
        """Up, then down."""
        down = self._start_down(self._start_up(plan), plan)
        with self.stats.phase("exchange"):
            gathered = self.rounds.unseal(down.wait(), self.rounds.name_of("down"))
        with self.stats.phase("memory"):
            scales, packed = _split(gathered, self._edges)
            update = _scaled(_unpacked(packed.t().flatten(), self.layout.compressed), self._edges, scales.t())
            return [Part(self._where, update.mul_(1.0 / self.divisor), source=gathered)]

    def _start_up(self, plan: int) -> Pending:
        """Send every owner its coordinates' signs, and all scales; keep the rest, and what is owned whole."""
        size, values = self.comm.size, self.memory.residual[self._where]
        with self.stats.phase("select"):
            code, sent = _encode(values, self._edges, plan * size)
            head, signs = code[: -plan * size], code[-plan * size :].view(plan, size)
            message = torch.cat([head.expand(size, -1), signs.t()], dim=1)
        with self.stats.phase("exchange"):
            pending = self.comm.start_alltoall(wire.seal(message), self.rounds.name_of("up"))
        with self.stats.phase("memory"):
            own = values[self.owned].clone()
            self.keep_rest(sent)
            self.memory.keep(self.owned, own, mask=False)
        return pending

    def _start_down(self, up: Pending, plan: int) -> Pending:
        """Sum what came for this rank's shard, send everybody the sum's signs, and keep the rest."""
        edges = [-(-(edge - self.comm.rank) // self.comm.size) for edge in self._edges]
        with self.stats.phase("exchange"):
            received = self.rounds.unseal(up.wait(), self.rounds.name_of("up"))
        with self.stats.phase("select"):
            total = self.memory.residual[self.owned].clone()
            for sender, row in enumerate(received):
                if sender != self.comm.rank:
                    total += _decode(row, edges)
            code, sent = _encode(total, edges, plan)
        with self.stats.phase("exchange"):
            pending = self.comm.start_allgather(wire.seal(code.unsqueeze(0))[0], self.rounds.name_of("down"))
        with self.stats.phase("memory"):
            self.memory.keep(self.owned, total - sent, mask=False)
        return pending


def _encode(values: Tensor, edges: Sequence[int], nbytes: int) -> tuple[Tensor, Tensor]:
    """The code of a vector whose tensors lie between the edges, scales and then signs; and what it stands for."""
    parts = [values[start:stop] for start, stop in pairwise(edges)]
    counts = torch.tensor([max(1, part.numel()) for part in parts], dtype=torch.float32, device=values.device)
    scales = (torch.stack(torch._foreach_norm(parts, 1)) / counts).to(_SCALE)
    negative, packed = values < 0.0, torch.empty(nbytes, dtype=torch.uint8, device=values.device)
    bits.pack(negative.to(torch.int8).neg_(), 1, packed)
    sent = _scaled(torch.where(negative, -1.0, 1.0), edges, scales.float().unsqueeze(1))
    return torch.cat([scales.view(torch.uint8), packed]), sent


def _decode(code: Tensor, edges: Sequence[int]) -> Tensor:
    """The vector that a code stands for."""
    scales, packed = _split(code, edges)
    return _scaled(_unpacked(packed, edges[-1]), edges, scales.unsqueeze(1))


def _split(codes: Tensor, edges: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The scales (float32) and the packed signs of one code or of several."""
    head = _SCALE.itemsize * (len(edges) - 1)
    return codes[..., :head].clone(memory_format=torch.contiguous_format).view(_SCALE).float(), codes[..., head:]


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """The first signs, 1 or -1, float32."""
    signs = torch.empty(count, dtype=torch.float32, device=packed.device)
    bits.unpack(packed.contiguous(), 1, signs)
    return signs.mul_(2.0).add_(1.0)


def _scaled(signs: Tensor, edges: Sequence[int], scales: Tensor) -> Tensor:
    """Multiply, in place, each tensor by its row of scales, coordinate i by the one at i modulo the row's length."""
    period = scales.shape[1]
    for start, stop, row in zip(edges, edges[1:], scales, strict=False):
        turned, rest = row.roll(-(start % period)), stop - (stop - start) % period
        signs[start:rest].view(-1, period).mul_(turned)
        signs[rest:stop].mul_(turned[: stop - rest])
    return signs
