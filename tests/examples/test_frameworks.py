"""The frameworks on top of DistributedDataParallel train with the hook; where they are installed."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.ranks import ROOT, launch

pytestmark = pytest.mark.slow  # they import much


@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers"])
def test_a_framework_trains_with_the_hook(name: str) -> None:
    pytest.importorskip(name)
    script = ROOT / "examples" / f"with_{'trainer' if name == 'transformers' else name}.py"
    completed = launch(2, [sys.executable, str(script)], launcher="torchrun")
    assert completed.returncode == 0, completed.output
    told = re.search(r"after 40 steps, ([0-9.]+) times fewer bytes", completed.output)
    assert told is not None, completed.output
    assert float(told[1]) > 5.0
