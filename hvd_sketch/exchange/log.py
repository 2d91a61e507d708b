"""What rank 0 logs of an exchange: a line at its first compressed step, and one when training ends."""

from __future__ import annotations

import logging
import sys
import weakref

from hvd_sketch.comm.base import Communicator
from hvd_sketch.exchange.progress import Progress
from hvd_sketch.stats import Stats


class Unconfigured(logging.Handler):
    """Writes to stderr where nobody has configured logging, as Python itself does with warnings alone."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless another handler gets it."""
        if not logging.getLogger().handlers and LOGGER.handlers == [self]:
            sys.stderr.write(f"{self.format(record)}\n")


LOGGER = logging.getLogger("hvd_sketch")
LOGGER.addHandler(Unconfigured())
if LOGGER.level == logging.NOTSET:  # else these lines would be shown to those alone who ask for all libraries' own
    LOGGER.setLevel(logging.INFO)


class Log:
    """Tells on rank 0, where there are other ranks, at the first compressed step and when the exchange ends.

    It ends with the last reference to it, or with the process. No device is waited for.

    Args:
        label: the compressor; nothing is told without one.

    Attributes:
        notes: what the first line says beside the bytes, from who knows it.
    """

    def __init__(self, label: str) -> None:
        self.notes: list[str] = []
        self._label = label
        self._has_begun = self._has_told = False
        self._before = 0, 0

    def begin_step(self, stats: Stats) -> None:
        """What was sent until now belongs to no step, or to the last one."""
        self._before = stats.bytes_sent, stats.dense_bytes

    def end_step(self, exchange: Progress, *, compressed: bool) -> None:
        """A step is done."""
        comm, stats = exchange.comm, exchange.stats
        if not self._label or comm.rank != 0 or comm.size == 1:
            return
        if not self._has_begun:
            self._has_begun = True
            weakref.finalize(exchange, _tell_end, self._label, stats)
        if compressed and not self._has_told:
            self._has_told = True
            sent, dense = stats.bytes_sent - self._before[0], stats.dense_bytes - self._before[1]
            LOGGER.info("hvd_sketch: %s", self._first_line(exchange, sent, dense))
        self.begin_step(stats)

    def _first_line(self, exchange: Progress, sent: int, dense: int) -> str:
        layout, ranks = exchange.layout, exchange.comm.size
        return "; ".join(
            [
                f"step {exchange.stats.steps} is the first compressed one: {self._label} on {ranks} ranks",
                f"{_cost(sent, dense)} a step and rank",
                f"{layout.compressed:,} parameters compressed, {layout.dense:,} sent whole",
                *self.notes,
                *exchange.comm.remarks(),
            ]
        )


class MethodLog:
    """Tells the same of a method whose messages are no exchange's: when it has sent something, and at the end.

    Args:
        label: the method, and how it is set.
    """

    def __init__(self, label: str) -> None:
        self._label, self._has_told = label, False

    def end_step(self, method: object, comm: Communicator, stats: Stats) -> None:
        """A step of a method is done, of which these are the counters."""
        if self._has_told or comm.rank != 0 or comm.size == 1 or not stats.bytes_sent:
            return
        self._has_told = True
        weakref.finalize(method, _tell_end, self._label, stats)
        LOGGER.info(
            "hvd_sketch: %s on %d ranks has sent its first message, in step %d: %s until then",
            *(self._label, comm.size, stats.steps, _cost(stats.bytes_sent, stats.dense_bytes)),
        )


def _tell_end(label: str, stats: Stats) -> None:
    LOGGER.info(
        "hvd_sketch: the end after %d steps, %d of them void: %s, in all; %s",
        stats.steps,
        stats.skipped,
        _cost(stats.bytes_sent, stats.dense_bytes),
        label,
    )


def _cost(sent: int, dense: int) -> str:
    return f"{sent / 1e6:,.3f} MB sent in place of {dense / 1e6:,.3f} MB ({dense / max(sent, 1):.1f} times less)"
