"""What one run did, as a few lists that fit into a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """The curve and the costs of one run, as rank 0 saw them.

    Attributes:
        label: what the run is called in the table and the picture.
        metric: what ``values`` are.
        settings: what must be equal in runs that are compared.
        steps, values, bytes: at each evaluation the step, the metric, and the bytes that one
            rank had sent until then.
        dense_bytes: what it would have sent without compression, in float32.
        seconds: wall time of the steps by phase; evaluations and checkpoints are not counted.
    """

    label: str
    metric: str
    settings: dict[str, Any]
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    dense_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes sent, over the whole run with its warm-up; NaN if nothing was sent."""
        return self.dense_bytes / self.bytes[-1] if self.bytes and self.bytes[-1] else float("nan")

    def gap(self, baseline: Record) -> float:
        """The last value's distance from the baseline's, in percent of the baseline's."""
        return 100.0 * (self.values[-1] - baseline.values[-1]) / abs(baseline.values[-1])


def write(path: Path, records: Sequence[Record]) -> None:
    """Write records to a JSON file, and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")


def read_baseline(path: Path, settings: dict[str, Any]) -> Record:
    """The first record of a file, if it is of the same training.

    Raises:
        SystemExit: when a setting differs: the curves would not be comparable.
    """
    baseline = Record(**json.loads(path.read_text())[0])
    for name, value in settings.items():
        if baseline.settings.get(name) != value:
            raise SystemExit(
                f"--baseline {path} was trained with {name}={baseline.settings.get(name)!r}, this run has {value!r}: "
                "give both the same options"
            )
    return baseline
