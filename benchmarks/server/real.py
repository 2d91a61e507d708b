"""The straggler on real ranks: a server and four workers, of which one is slow.

``python -m benchmarks.server.real --seeds 0 1``

Runs `examples/async_training.py`: a step takes half a second, mostly asleep, and every method trains for a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.server import rows
from benchmarks.server.rows import Row

ROOT = Path(__file__).resolve().parent.parent.parent
RANKS, SECONDS, STEP = 5, 60.0, 0.5
FACTORS = (1.0, 5.0, 20.0)
METHODS = ("allreduce", "local", "swarm", "async", "async, 1/20", "fedasync", "fedat")
LAUNCHER = ("mpirun", "-np", str(RANKS), "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none")
PATIENCE = 900.0  # seconds for all methods of a factor and their start


def run(factor: float, seed: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The curves of these methods."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "curves.json")
        settings = {"straggler": factor, "seed": seed, "seconds": SECONDS, "step-seconds": STEP, "results": file}
        given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        command = [*LAUNCHER, sys.executable, "examples/async_training.py", *given, "--methods", *methods]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=PATIENCE)
        curves: list[dict[str, Any]] = json.loads(file.read_text())
        return curves


def row_of(curve: dict[str, Any]) -> Row:
    """What is kept of a curve."""
    return {
        "losses": [round(loss, 4) for loss in curve["loss"]],
        "megabytes": round(curve["megabytes"][-1], 3),
        "steps": curve["steps"],
    }


def main() -> None:
    """Measure what is missing."""
    options = rows.parser(__doc__).parse_args()
    for seed in options.seeds:
        for factor in FACTORS:
            cells = rows.grid(method=METHODS, factor=[factor], seed=[seed])
            missing = [str(cell["method"]) for cell in rows.missing("real ranks", cells, options.results)]
            if missing:
                for curve in run(factor, seed, missing):
                    cell = {"method": curve["label"], "factor": factor, "seed": seed}
                    rows.add("real ranks", cell, row_of(curve), options.results)


if __name__ == "__main__":
    main()
