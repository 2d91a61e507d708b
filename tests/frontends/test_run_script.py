"""``python -m hvd_sketch``: the script cannot tell that it is not run by itself, but for its optimizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.ranks import Completed, launch, run

RUNNER = [sys.executable, "-m", "hvd_sketch"]
SKETCH = ["--compression", "sketch", "--ratio", "10", "--warmup-steps", "0"]
TRAIN = """
import horovod.torch as hvd
import torch
import {imported}
hvd.init()
torch.manual_seed(0)
model = torch.nn.Linear(60, 50)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = {made}
optimizer.zero_grad()
model(torch.randn(8, 60)).square().mean().backward()
optimizer.step()
nonzero = int(torch.cat([p.grad.flatten() for p in model.parameters()]).count_nonzero())
print("nonzero", nonzero, "of", sum(p.numel() for p in model.parameters()), type(optimizer).__name__)
"""


def run_script(folder: Path, text: str, *arguments: str, options: list[str] = SKETCH) -> Completed:
    script = folder / "its own name.py"
    script.write_text(text)
    return run([*RUNNER, *options, str(script), *arguments])


def train(folder: Path, made: str, options: list[str] = SKETCH, imported: str = "sys") -> str:
    """The line that a script on two ranks tells, whose optimizer is made so."""
    script = folder / "train.py"
    script.write_text(TRAIN.format(made=made, imported=imported))
    completed = launch(2, [*RUNNER, *options, str(script)])
    assert completed.returncode == 0, completed.output
    lines = {line[line.index("nonzero") :] for line in completed.output.splitlines() if "nonzero" in line}
    assert len(lines) == 1
    return lines.pop()


def test_arguments_behind_the_script_are_the_scripts_own(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'a module beside the script'")
    text = "import beside, sys; print(sys.argv, __name__, __file__, sys.path[0], beside.NAME)"
    script = str(tmp_path / "its own name.py")
    arguments = ["--ratio", "3", "-x", "--compression=none", "--", "--check", "data*", ""]
    completed = run_script(tmp_path, text, *arguments)
    assert completed.returncode == 0, completed.output
    assert (
        completed.output.strip() == f"{[script, *arguments]} __main__ {script} {tmp_path} a module beside the script"
    )


def test_tracebacks_end_in_the_script(tmp_path: Path) -> None:
    completed = run_script(tmp_path, "def train():\n    return 1 / 0\n\ntrain()\n")
    assert completed.returncode == 1
    lines = completed.output.splitlines()
    assert lines[-1] == "ZeroDivisionError: division by zero"
    last = [line for line in lines if line.startswith("  File ")][-1]
    assert last == f'  File "{tmp_path / "its own name.py"}", line 2, in train'


@pytest.mark.parametrize(
    ("leave", "status"), [("sys.exit(7)", 7), ("sys.exit()", 0), ("sys.exit('sorry')", 1), ("os._exit(9)", 9)]
)
def test_exit_codes_pass_through(tmp_path: Path, leave: str, status: int) -> None:
    completed = run_script(tmp_path, f"import os, sys\n{leave}")
    assert completed.returncode == status
    assert completed.output.strip() == ("sorry" if "sorry" in leave else "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the script to run is missing"),
        (["nowhere.py"], "there is no script 'nowhere.py' in "),
        (["--ratio", "0.5", __file__], "ratio must be above 1, got 0.5"),
        (["--compression", "zip", __file__], "invalid choice: 'zip'"),
        (["--warmup-steps", "-3", __file__], "warmup_steps must be at least 0"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_line(arguments: list[str], expected: str) -> None:
    completed = run([*RUNNER, *arguments])
    assert completed.returncode == 2
    assert expected in completed.output
    assert "Traceback" not in completed.output


def test_check_reports_what_is_installed() -> None:
    completed = run([*RUNNER, "--check"])
    assert completed.returncode == 0
    for part in ("torch", "Horovod", "mpi4py", "kernel"):
        assert part in completed.output


HALF_PRECISION = "hvd.DistributedOptimizer(optimizer, model.named_parameters(), {}compression=hvd.Compression.fp16)"


@pytest.mark.parametrize(
    ("made", "imported"),
    [
        ("hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())", "sys"),
        (HALF_PRECISION.format(""), "sys"),
        (HALF_PRECISION.replace("compression=", "").format(""), "sys"),
        ("horovod.torch.DistributedOptimizer(optimizer)", "horovod.torch"),
    ],
    ids=["plain", "fp16", "fp16 by position", "full name"],
)
def test_the_scripts_optimizer_is_compressed_whatever_it_chose(tmp_path: Path, made: str, imported: str) -> None:
    told = train(tmp_path, made, imported=imported).split()
    assert 50 < int(told[1]) < 3050 // 2
    assert told[2:] == ["of", "3050", "SGD"]


def test_a_compressor_that_the_script_brings_is_kept(tmp_path: Path) -> None:
    made = HALF_PRECISION.replace("hvd.Compression.fp16", "hvd_sketch.Compression.sketch(cols=10, k=7)").format("")
    assert int(train(tmp_path, made, imported="hvd_sketch").split()[1]) == 57


@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_without_sparsifying_everything_is_sent(tmp_path: Path, compression: str) -> None:
    told = train(tmp_path, HALF_PRECISION.format(""), ["--compression", compression])
    assert int(told.split()[1]) > 3000


def test_what_the_script_may_not_combine_is_told(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(made=HALF_PRECISION.format("op=hvd.Adasum, "), imported="sys"))
    completed = launch(2, [*RUNNER, *SKETCH, str(script)])
    assert completed.returncode != 0
    assert completed.output.count("op=2 cannot be combined with compression: only Average and Sum are linear") == 2
