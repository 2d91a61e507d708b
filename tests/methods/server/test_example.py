"""The example with a server, as a user runs it, and its picture."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.ranks import ROOT, python, run


def test_the_example_trains_tells_and_draws(tmp_path: Path) -> None:
    script = (str(ROOT / "mpi_scripts" / "swarm.sh"), "4", "examples/async_training.py")
    methods = ("--methods", "allreduce", "async, 1/20", "fedat", "--step-seconds", "0.03", "--straggler", "4")
    results = tmp_path / "curves.json"
    completed = run([*script, *methods, "--seconds", "3", "--moments", "2", "--results", str(results)], timeout=200)
    assert completed.returncode == 0, completed.output
    allreduce, asynchronous, fedat = json.loads(results.read_text())
    assert allreduce["steps"] == [25, 25, 25]  # what the slow worker can do in the time
    slow, *fast = asynchronous["steps"]
    assert min(fast) >= slow > 0  # how much more depends on the machine
    for curve in (allreduce, asynchronous, fedat):
        assert len(curve["loss"]) == len(curve["megabytes"]) == 2
        assert curve["loss"][1] < curve["loss"][0] < 4.7
    picture = tmp_path / "server.png"
    command = python(ROOT / "examples" / "async_picture.py", picture, results, results)
    drawn = run(command)
    assert drawn.returncode == 0, drawn.output
    assert picture.exists()
