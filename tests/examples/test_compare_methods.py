"""The comparison of the methods runs all of them at the bytes it says, and goes on where it was."""

import json
from pathlib import Path
from typing import Any

from tests.support.ranks import ROOT, launch, python


def compare(results: Path, *options: object) -> list[dict[str, Any]]:
    script = python(ROOT / "examples" / "compare_methods.py", "--quick", "--steps", "2")
    completed = launch(2, (*script, "--eval-every", "1", "--results", str(results), *map(str, options)), timeout=240)
    assert completed.returncode == 0, completed.output
    loaded: list[dict[str, Any]] = json.loads(results.read_text())
    return loaded


def test_it_trains_by_every_method_once_and_draws(tmp_path: Path) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "curves.png"
    first = compare(results, "--methods", "dense", "EF")
    assert [(run["settings"]["task"], run["label"]) for run in first] == [
        (task, label) for task in ("digits", "text") for label in ("dense", "EF")
    ]
    whole = compare(results, "--plot", picture)
    assert whole[:4] == first
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(whole) == 18
    for run in whole:
        assert run["steps"] == [1, 2]
        if run["label"] in ("EF", "SAEF"):
            assert abs(run["dense_bytes"] / run["bytes"][-1] - 8.0) < 0.1
    others = compare(results, "--compressor", "tensor", "--methods", "dense", "Accordion", "--lr-scale", "0.1")
    assert others[:18] == whole
    assert [run["label"] for run in others[18:]] == ["dense", "Accordion"] * 2
    assert others[18]["settings"]["lr"] == 0.1 * whole[0]["settings"]["lr"]
