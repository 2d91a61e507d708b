"""Let one rank fail in every way on every backend, and write what came of it to docs/faults.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.flips import METHODS
from benchmarks.faults.worker import ALONE, BEFORE, FAULTS, VICTIM, in_process
from benchmarks.faults.worker import THROUGH_DDP as THROUGH_DDP

RANKS, LIMIT, HUNG = 3, 10.0, 120.0
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "faults.md"
MARK = "<!-- below: written by `make faults` -->"
MPIRUN = ("mpirun", "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none", "-np", str(RANKS))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--no-python")
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "mpi4py": MPIRUN,
    "Horovod over MPI": MPIRUN,
    "Horovod over Gloo": ("horovodrun", "--gloo", "-np", str(RANKS)),
    "torchrun": TORCHRUN,
    THROUGH_DDP: TORCHRUN,
}
IN_PROCESS = "in process"
BETWEEN = "Methods of their own, over mpi4py, struck before a step:"


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        seconds: from the fault to the end of the last rank; None if there was none within `HUNG` seconds.
        said: of each rank, what it left.
    """

    seconds: float | None
    said: list[dict[str, Any]]

    def in_words(self) -> str:
        """A cell of the table."""
        if self.seconds is None:
            return "**hangs**"
        others = [said for rank, said in enumerate(self.said) if rank != VICTIM]
        if all("end" in said for said in self.said):
            same = all(said["end"] == self.said[0]["end"] for said in self.said)
            return "goes on, identical" if same else "**goes on, and differs**"
        told = sum("error" in said for said in others)
        by = "all told" if told == len(others) else "ended by the launcher" if not told else f"{told} told, then ended"
        return f"{self.seconds:.1f} s, {by}"


def run(backend: str, fault: str) -> Outcome:
    """One cell."""
    if backend == IN_PROCESS:
        said = in_process(fault, LIMIT, RANKS)
        times = [each["time"] for each in said]
        return Outcome(max(times) - said[VICTIM]["time"], said)
    with tempfile.TemporaryDirectory() as name:
        command = [*LAUNCHERS.get(backend, MPIRUN), sys.executable, "-m", "benchmarks.faults.worker"]
        environment = {**os.environ, "HVD_SKETCH_TIMEOUT": str(LIMIT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, backend, fault, str(LIMIT), name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(HUNG)
            ended: float | None = time.time()
        except subprocess.TimeoutExpired:
            ended = None
            process.terminate()
            process.wait(60)  # torchrun gives a rank half a minute to end
        files = [Path(name, f"{rank}.json") for rank in range(RANKS)]
        said = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        struck = said[VICTIM].get("time")
        return Outcome(ended - struck if ended is not None and struck is not None else None, said)


def table(outcomes: dict[tuple[str, str], Outcome], faults: Iterable[str], backends: Sequence[str]) -> str:
    """Faults by backends."""
    lines = [f"| one rank of {RANKS} | {' | '.join(backends)} |", "|---" * (len(backends) + 1) + "|"]
    for fault in faults:
        cells = [outcomes[fault, backend].in_words() if (fault, backend) in outcomes else "" for backend in backends]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all of it, and write the page."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    cells = [*product(FAULTS, LAUNCHERS), *product(ALONE, [IN_PROCESS]), *product(BEFORE, METHODS)]
    for fault, backend in cells:
        outcome = outcomes[fault, backend] = run(backend, fault)
        told = next((said["error"] for said in outcome.said if "error" in said), "")
        print(f"{fault} | {backend} | {outcome.in_words()} | {told}", flush=True)
    page = PAGE.read_text() if PAGE.exists() else f"{MARK}\n"
    by_backend, by_method = table(outcomes, FAULTS, [*LAUNCHERS, IN_PROCESS]), table(outcomes, BEFORE, [*METHODS])
    PAGE.write_text(f"{page[: page.index(MARK)]}{MARK}\n\n{by_backend}\n\n{BETWEEN}\n\n{by_method}\n")


if __name__ == "__main__":
    main()
