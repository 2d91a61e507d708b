"""What a run cost and how well it chose: bytes, ratio, seconds, captured energy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm.base import Communicator


@dataclass
class Stats:
    """Counters of one rank since the start of training.

    Attributes:
        steps: exchanges done.
        skipped: of these, the steps that a non-finite gradient on some rank made void.
        bytes_sent: bytes this rank sent, by the ring formulas of `hvd_sketch.comm.Communicator`.
        dense_bytes: bytes plain float32 allreduce would have sent.
        local_bytes: bytes this rank sent to others of its host, where its exchange is hierarchical; then the two
            above are of what leaves the host.
        captured_energy: share of the squared norm of the memory that the last step sent, 0 to 1:
            of the memory summed over the ranks by the sketch's own estimate, or of this rank's
            where it selects by itself; NaN when not known.
        clip: factor the last gradient was multiplied by, 1 when it was within the norm.
        drift: how far an element of a parameter here was from rank 0's at most when it was last taken over, see
            ``resync_every``.
        departed: ranks that have gone during elastic training, with what they had not sent.
        seconds: wall time by phase.
    """

    steps: int = 0
    skipped: int = 0
    bytes_sent: int = 0
    dense_bytes: int = 0
    local_bytes: int = 0
    drift: float = 0.0
    departed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _captured: Callable[[], float] | float = field(default=float("nan"), repr=False)
    _clip: Tensor | float = field(default=1.0, repr=False)

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes sent, over the whole run; NaN before anything was sent."""
        return self.dense_bytes / self.bytes_sent if self.bytes_sent else float("nan")

    @property
    def captured_energy(self) -> float:
        """See above; waits for a device, and measures what is kept there, only when somebody asks."""
        if callable(self._captured):
            self._captured = self._captured()
        return self._captured

    @captured_energy.setter
    def captured_energy(self, share: float) -> None:
        self._captured = share

    def note_norms(self, sent: Sequence[Tensor], memory: Sequence[Tensor]) -> None:
        """Take the captured energy of a step from the norms of what was sent, and of the memory, of all its parts."""
        self._captured = lambda: _share(_norm(sent), _norm(memory))

    def note_sent(self, sent: Tensor, kept: Tensor) -> None:
        """Take it from the norm of what was sent, and from the memory that is left without it, until the next step."""

        def share() -> float:
            norm = float(sent)
            return _share(norm, math.hypot(norm, float(torch.linalg.vector_norm(kept))))

        self._captured = share

    @property
    def clip(self) -> float:
        """See above; waits likewise."""
        self._clip = float(self._clip)
        return self._clip

    @clip.setter
    def clip(self, factor: Tensor | float) -> None:
        self._clip = factor

    def __getstate__(self) -> dict[str, Any]:
        """With everything measured."""
        return {**vars(self), "_captured": self.captured_energy, "_clip": self.clip}

    def as_dict(self) -> dict[str, int | float]:
        """All of it as plain numbers, for a logger of yours; seconds are by phase, as ``seconds_exchange``."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "bytes_sent": self.bytes_sent,
            "dense_bytes": self.dense_bytes,
            "local_bytes": self.local_bytes,
            "ratio": self.ratio,
            "captured_energy": self.captured_energy,
            "clip": self.clip,
            "drift": self.drift,
            "departed": self.departed,
            **{f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()},
        }

    @contextmanager
    def counting(self, comm: Communicator) -> Iterator[None]:
        """Add the bytes that this rank sends inside to ``bytes_sent``."""
        before = comm.bytes_sent
        yield
        self.bytes_sent += comm.bytes_sent - before

    @contextmanager
    def counting_inside(self, local: Communicator) -> Iterator[None]:
        """Add them to ``local_bytes``."""
        before = local.bytes_sent
        yield
        self.local_bytes += local.bytes_sent - before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[name]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _norm(parts: Sequence[Tensor]) -> float:
    return math.hypot(*map(float, parts))


def _share(part: float, whole: float) -> float:
    return (part / whole) ** 2 if whole > 0.0 else 1.0
