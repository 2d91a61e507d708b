"""One memory and one message a host: a dense sum inside, and the compressed exchange between hosts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.copies import COPIES, majority, thrice
from hvd_sketch.comm.hosts import Hosts
from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.division import Division, LaysOut
from hvd_sketch.exchange.intake import Factor, Finite
from hvd_sketch.exchange.progress import Undo
from hvd_sketch.exchange.rounds import Rounds
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.layout import Layout
from hvd_sketch.memory import Memory
from hvd_sketch.saved import Form


class Divides(LaysOut, Protocol):
    """What the exchange needs of a compressor; see `hvd_sketch.compressors.base.Compressor`."""

    def plan(self, layout: Layout, step: int, ranks: int) -> Any: ...

    def build(self, setting: Setting) -> Exchange: ...


class HierarchicalExchange(Exchange):
    """An exchange between hosts of L ranks each, with the compressor unchanged and one memory a host.

    With g_hl the gradient of the l-th rank on host h of H, cut into L parts, see `Division`::

        inside    s_hl = sum_j g_hj on part l              reduce-scatter of float32
        across    u_l = the compressor's update of c_h s_hl / L over h = 1 … H, with a memory of part l alone
        inside    u = (u_1 … u_L)                          allgather of float32

    (of a sum, without ``/ L``). So it is the exchange of H ranks that have L times the batch each, and memory,
    selection and arithmetic of a rank are those of ``d / L`` coordinates. What a host has sent plus what its ranks
    keep is the sum, or the mean, of what they computed. ``c_h`` clips that: the norm is that of the *host's* mean
    gradient.

    What the ranks have to tell, see `Rounds`, is summed inside first and then rides in the compressor's own message,
    so no rank waits for one message more between hosts. A step counts, is void, or fails for all ranks alike; if
    ranks selected different coordinates, parts where they did not have sent theirs, to nobody's use.

    ``memory`` is empty, unless somebody follows it, see `follow_memory`: then it is this host's, gathered inside
    after every step. Ranks of one host save parts, and have to load their own.

    Sent: ``2 (L-1)/L 4 d`` bytes inside, half as much again where the memory is followed, counted in
    ``stats.local_bytes``; and what the compressor sends of ``d / L`` coordinates to ``H - 1`` other hosts.

    Args:
        setting: of all ranks.
        hosts: the ranks of this host, and this one's peers.
        compressor: what each rank sends its part with.

    Attributes:
        part: the exchange across hosts.

    Raises:
        ConfigurationError: where a part is too small to be compressed.
    """

    shares_memory = True

    def __init__(
        self,
        setting: Setting,
        hosts: Hosts,
        compressor: Divides,
    ) -> None:
        super().__init__(replace(setting, momentum=None, plan=lambda step, ranks: self.part.plan))
        self.memory = Memory(0, setting.device)
        self.agree_on(f"{hosts} momentum_correction={setting.momentum}")
        self.log.notes.append(str(hosts))
        local = self._local = hosts.local
        division = self._division = Division(setting.layout, local.size, compressor)
        self._compressor, mine = compressor, division.layouts[local.rank]
        self._rows = torch.zeros(local.size, division.width, dtype=torch.float32, device=setting.device)
        plan = partial(compressor.plan, mine)
        self.part = compressor.build(
            replace(setting, layout=mine, comm=hosts.across, plan=plan, label="", clip_norm=None)
        )
        self.part.stats, self.part._told_void = self.stats, True  # which rank is not finite, the whole tells
        self._header = self.part.rounds = HostRounds(self.part, self.rounds, local.size)
        self._updates = division.of_vector(self.update)

    def plan_at(self, step: int) -> Any:
        """As for every `Exchange`; raises alike, for the plans of all parts are solved."""
        plans = [self._compressor.plan(layout, step, self.part.comm.size) for layout in self._division.layouts]
        return plans[self._local.rank]

    def sizes(self) -> str:
        """Nothing: each part has its own."""
        return ""

    def send(self, plan: Any, clip: Factor, finite: Finite) -> bool:
        """Never called: the part sends."""
        raise NotImplementedError("HierarchicalExchange sends by its part")

    def measure(self) -> tuple[Factor, Finite]:
        """Nothing: it is the host's gradient that is measured, when there is one."""
        return 1.0, True

    def _send(self, clip: Factor, finite: Finite) -> bool:
        """Sum inside, exchange across, gather inside; False if some rank is not finite."""
        self._local.occupation = self.comm.occupation
        with self.stats.counting_inside(self._local), self.stats.phase("inside"):
            factor = self.clip_factor(self._tell(self._sum_inside(), bool(finite)))
        problem = None
        try:
            self.part.run_measured(factor / self._local.size if self.average else factor, True)
        except (ConfigurationError, RankMismatchError) as error:
            problem = error
        self.stats.clip = factor
        if problem is None and self.part.void:
            return False
        with self.stats.counting_inside(self._local), self.stats.phase("inside"):
            self._gather_inside(problem)
        return True

    def _sum_inside(self) -> float:
        """Sum the gradients of this host, give the part its own, and return its norm."""
        torch._foreach_copy_(self._division.of_rows(self._rows), self._division.of_vector(self.gradient))
        wire.seal_lanes(self._rows)
        mine = self._local.reduce_scatter(self._rows, self.rounds.name_of("gradient"), self._check)
        self.part.staging.put_all(mine[: self.part.layout.total])
        return self.part.staging.norm()

    def _check(self, received: Tensor) -> None:
        """Note it if what came of a gradient is not what was sent."""
        self.rounds.note_damage(
            ~wire.lanes_intact(received), "what came of the gradients of this host is not what was sent"
        )

    def _tell(self, norm: float, finite: bool) -> float:
        """Sum inside what the ranks have to say of the step; the norm of the host's mean gradient."""
        norms = torch.zeros(self._local.size, dtype=torch.float64, device="cpu")
        norms[self._local.rank] = norm
        message = torch.cat([torch.zeros(wire.HEADER, dtype=torch.float64, device="cpu"), thrice(norms)])
        if not self.comm.muted:
            self.rounds.write_header(message[: wire.HEADER], finite and math.isfinite(norm))
        self._local.allreduce(message, self.rounds.name_of("header"))
        self._header.speak_for_host(message)
        return math.hypot(*majority(message[wire.HEADER :].tolist())) / self._local.size

    def _gather_inside(self, problem: Exception | None) -> None:
        """The whole update, and the whole memory if somebody follows it.

        Raises:
            ConfigurationError, RankMismatchError: on all ranks of this host, when the exchange of any part failed.
        """
        if self._gather(self.part.update, self._updates, "update", failed=problem is not None):
            told = self._local.allgather_object(problem and str(problem), self.rounds.name_of("problem"))
            raise problem or RankMismatchError(next(filter(None, told)))
        if self.memory.residual.numel():
            errors = self.part.memory.residual.clone()
            errors[self.part.owned] /= self.part.comm.size
            self._gather(errors, self._division.of_vector(self.memory.residual), "memory")

    def _gather(self, mine: Tensor, into: list[Tensor], what: str, *, failed: bool = False) -> bool:
        """Collective inside: every part of a vector; whether some rank said that it failed."""
        row = self._rows[self._local.rank]
        row[: mine.numel()] = mine
        row[-COPIES:] = failed
        gathered = self._local.allgather(row, self.rounds.name_of(what))
        torch._foreach_copy_(into, self._division.of_rows(gathered))
        return any(majority(gathered[:, -COPIES:].T.reshape(-1).tolist()))

    def follow_memory(self) -> None:
        """Have ``memory`` hold what this host has not sent after every step; what is owned there, by its share."""
        if not self.memory.residual.numel():
            self.memory = Memory(self.layout.total, self.gradient.device)

    def unsent(self) -> Tensor:
        """This rank's part, which it holds for as many ranks as are on its host; what is owned there whole."""
        whole = torch.zeros(self.layout.total, dtype=torch.float32, device=self.gradient.device)
        rows = torch.zeros_like(self._rows)
        rows[self._local.rank, : self.part.layout.total] = self.part.memory.residual
        torch._foreach_copy_(self._division.of_vector(whole), self._division.of_rows(rows))
        return whole.mul_(self._local.size)

    def _leave_alone(self) -> None:
        super()._leave_alone()
        self.part.leave_alone(self._in_part(self.absent))

    def _in_part(self, positions: Iterable[int]) -> list[int]:
        """Where the part has what it has of these slots."""
        names = {self.layout.slots[position].name for position in positions}
        return [position for position, slot in enumerate(self.part.layout.slots) if slot.name in names]

    def _count(self) -> None:
        """The part has."""

    def _agree(self) -> None:
        """All ranks, and then the peers, who may have saved states to share."""
        super()._agree()
        part = self.part
        with self.stats.counting(part.comm):
            part._agree()
            if part.step != self.step:  # none of the peers has a saved state, and others have
                part._load_common_state({**part._common_state(), "step": self.step})
                part._agree()

    def reset(self) -> None:
        """As for every `Exchange`."""
        super().reset()
        self.part.reset()

    def snapshot(self) -> Undo:
        """As for every `Exchange`."""
        whole, part = super().snapshot(), self.part.snapshot()

        def restore(positions: Iterable[int] | None = None) -> None:
            slots = None if positions is None else list(positions)
            whole(slots)
            part(None if slots is None else self._in_part(slots))

        return restore

    def state_dict(self) -> dict[str, Any]:
        """This rank's part as well."""
        return {**super().state_dict(), "part": self.part.state_dict()}

    def state_form(self) -> Form:
        """With that of the part."""
        return {**super().state_form(), "part": self.part.state_form()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As for every `Exchange`; hosts of another size do not fit."""
        super().load_state_dict(state)
        self.part.load_state_dict(state["part"])


class HostRounds(Rounds):
    """The rounds of a part: their header is the sum of its host's ranks', so that sums speak for all ranks.

    Args:
        part: whose.
        whole: those of the whole exchange, which heed what is told.
        local: how many ranks a host has.
    """

    def __init__(self, part: Exchange, whole: Rounds, local: int) -> None:
        super().__init__(part.comm, part.stats, part.drift)
        self._whole, self._local = whole, local
        self._of_host = torch.zeros(wire.HEADER, dtype=torch.float64, device="cpu")

    def speak_for_host(self, told: Tensor) -> None:
        """Take the sum of the headers of this host's ranks for the coming step.

        What is sent is their mean, of which a host is one, and one of which some ranks have joined is half of one:
        sums over hosts are then exact in any order.
        """
        present = wire.read_header(told).present
        share = 1.0 if present == self._local else 0.5
        self._of_host = told[: wire.HEADER] / max(1.0, present) * share

    @property
    def ranks_each(self) -> int:
        """Those of a host."""
        return self._local

    def write_header(self, message: Tensor, finite: bool | Tensor) -> None:
        """Put what the host's ranks have to say of the step in front of a message."""
        message[: wire.HEADER].copy_(self._of_host)

    def heed(self, header: wire.Header) -> bool:
        """As all ranks do alike; of a host of which some ranks have joined, half count as present."""
        taken = self._whole.heed(header._replace(present=math.ceil(header.present * self._local)))
        self.present, self.all_present = self._whole.present, self._whole.all_present
        self.flushes, self.regular = self._whole.flushes, self._whole.regular
        return taken

    def note_damage(self, damaged: Tensor, what: str) -> None:
        """Note it for the next step of all."""
        self._whole.note_damage(damaged, what)

    def ask_to_flush(self, asked: bool = True) -> None:
        """Ask all ranks."""
        self._whole.ask_to_flush(asked)
