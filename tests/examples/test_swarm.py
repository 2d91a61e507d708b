"""The example of SwarmSGD and its launch script, as a user runs them."""

import json
from pathlib import Path

from tests.support.ranks import ROOT, run


def test_the_example_trains_tells_and_draws(tmp_path: Path) -> None:
    script = (str(ROOT / "mpi_scripts" / "swarm.sh"), "4", "examples/swarm_transformer.py")
    sizes = ("--seconds", "4", "--step-seconds", "0.05", "--moments", "2", "--graph", "ring")
    files = ("--results", str(tmp_path / "curves.json"), "--plot", str(tmp_path / "swarm.png"))
    completed = run([*script, *sizes, *files], timeout=250)
    assert completed.returncode == 0, completed.output
    allreduce, swarm = json.loads((tmp_path / "curves.json").read_text())
    assert (allreduce["label"], swarm["label"]) == ("allreduce", "swarm")
    assert allreduce["steps"][-1] == [16] * 4  # what the slow node can do in the time
    assert max(allreduce["spread"]) < 1e-5 < swarm["spread"][-1]
    assert all(swarm["meetings"][rank] for rank in (1, 2, 3))
    assert (tmp_path / "swarm.png").exists()
    assert (tmp_path / "swarm_timeline.png").exists()


def test_the_script_says_how_it_is_used() -> None:
    completed = run([str(ROOT / "mpi_scripts" / "swarm.sh"), "many", "train.py"])
    assert completed.returncode == 2
    assert "usage: swarm.sh NP" in completed.output
