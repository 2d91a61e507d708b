"""What a server and its workers count."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvd_sketch.stats import Stats


@dataclass
class WorkerCounts:
    """What a server saw of one worker.

    Attributes:
        pushes: that came.
        accepted, refused: by the rule.
        void: of the pushes, those that could not count: values not finite, or damaged on the way.
        lost: how often it was given up.
        moment: of its own state: a number that it chose when it began, and one more for every push accepted.
    """

    pushes: int = 0
    accepted: int = 0
    refused: int = 0
    void: int = 0
    lost: int = 0
    moment: int = 0


@dataclass
class ServerStats(Stats):
    """Counters of one rank, of a worker, of the server, or of both where the server works as well.

    ``bytes_sent`` and ``dense_bytes`` are of the models and updates that it sent. ``seconds["model"]``
    is what a worker waited for models: one round trip for each, or else the server is the bottleneck.

    Attributes:
        pushes: messages with an update, sent by a worker or come to the server.
        bytes_received: of models and updates.
        largest_staleness, mean_staleness: of the pushes that came to the server.
        workers: what the server saw of each, by rank.
    """

    pushes: int = 0
    bytes_received: int = 0
    largest_staleness: int = 0
    mean_staleness: float = 0.0
    workers: dict[int, WorkerCounts] = field(default_factory=dict)

    def note_push(self, staleness: int) -> None:
        """A push of this staleness has come."""
        self.pushes += 1
        self.largest_staleness = max(self.largest_staleness, staleness)
        self.mean_staleness += (staleness - self.mean_staleness) / self.pushes
