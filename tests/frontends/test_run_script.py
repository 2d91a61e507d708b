"""``python -m hvd_sketch``: the script cannot tell that it is not run by itself, but for its optimizer."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hvd_sketch.frontends.run_script import main
from tests.support.ranks import Completed, launch, python, run

RUNNER = ["-m", "hvd_sketch"]
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
    return run(python(*RUNNER, *options, str(script), *arguments))


def train(folder: Path, made: str, options: list[str] = SKETCH, imported: str = "sys") -> str:
    """The line that a script tells, whose optimizer is made so."""
    completed = run_script(folder, TRAIN.format(made=made, imported=imported), options=options)
    assert completed.returncode == 0, completed.output
    (line,) = (line for line in completed.output.splitlines() if line.startswith("nonzero"))
    return line


def test_arguments_behind_the_script_are_the_scripts_own(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'a module beside the script'")
    text = "import beside, sys; print(sys.argv, __name__, __file__, sys.path[0], beside.NAME)"
    script = str(tmp_path / "its own name.py")
    arguments = ["--ratio", "3", "-x", "--compression=none", "--", "--check", "data*", ""]
    completed = run_script(tmp_path, text, *arguments)
    assert completed.returncode == 0, completed.output
    told = completed.output.splitlines()
    assert told[0] == f"{[script, *arguments]} __main__ {script} {tmp_path} a module beside the script"


def test_a_module_runs_as_by_python_itself(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "beside.py").write_text("NAME = 'a module of the package'")
    text = "import sys; from .beside import NAME; print(sys.argv, __name__, __package__, NAME)"
    (package / "train.py").write_text(text)
    (package / "__main__.py").write_text(text)
    for module, file in {"package.train": "train.py", "package": "__main__.py"}.items():
        by_python = run([sys.executable, "-m", module, "--ratio", "3"], cwd=tmp_path)
        completed = run(python(*RUNNER, *SKETCH, "-m", module, "--ratio", "3"), cwd=tmp_path)
        assert completed.returncode == 0, completed.output
        assert completed.output.splitlines()[0] == by_python.output.strip()
        assert str(package / file) in completed.output


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
    assert completed.output.startswith("sorry\n") or "sorry" not in leave


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the script to run is missing"),
        (["nowhere.py"], "there is no script 'nowhere.py' in "),
        (["-m", "nowhere.at.all"], "there is no module 'nowhere.at.all' in "),
        (["--ratio", "0.5", __file__], "ratio must be at least 1, which sends everything; got 0.5"),
        (["--compression", "zip", __file__], "invalid choice: 'zip'"),
        (["--warmup-steps", "-3", __file__], "warmup_steps must be at least 0"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_line(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_check_reports_what_is_installed() -> None:
    completed = run(python(*RUNNER, "--check"))
    assert completed.returncode == 0
    for part in ("torch", "Horovod", "mpi4py", "kernel"):
        assert part in completed.output
    assert "links" not in completed.output


def test_check_under_a_launcher_reports_how_far_the_ranks_are() -> None:
    completed = launch(2, python(*RUNNER, "--check"), launcher="torchrun", env={"HVD_SKETCH_CROSSING": "0.04"})
    assert completed.returncode == 0
    assert completed.output.count("links of 2 ranks, torch: messages take 40 ms; sums travel directly") == 1


HALF_PRECISION = "hvd.DistributedOptimizer(optimizer, model.named_parameters(), {}compression=hvd.Compression.fp16)"
DOORS = """
import horovod.torch as hvd
import horovod.torch.optimizer, hvd_sketch, torch, typing
from horovod.torch import DistributedOptimizer
from horovod.torch.optimizer import DistributedOptimizer as of_its_module
hvd.init()
hvd_sketch.DistributedOptimizer  # imports ours
half, own = hvd.Compression.fp16, hvd_sketch.Compression.sketch(cols=10, k=7)
for name, wrap in {
    "attribute": lambda o, m: hvd.DistributedOptimizer(o, named_parameters=m.named_parameters()),
    "no names": lambda o, m: horovod.torch.DistributedOptimizer(o),
    "imported": lambda o, m: DistributedOptimizer(o, m.named_parameters(), compression=half),
    "of its module": lambda o, m: of_its_module(o, m.named_parameters(), half),
    "full name": lambda o, m: horovod.torch.optimizer.DistributedOptimizer(o, m.named_parameters()),
    "own compressor": lambda o, m: hvd.DistributedOptimizer(o, m.named_parameters(), own),
}.items():
    torch.manual_seed(0)
    model = torch.nn.Linear(60, 50)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    for step in range(2 + hvd.rank()):
        optimizer.zero_grad()
        model(torch.randn(8, 60)).square().mean().backward()
        optimizer.step()
    nonzero = int(torch.cat([p.grad.flatten() for p in model.parameters()]).count_nonzero())
    print(f"<{name}|{nonzero}|{type(optimizer).__name__}|{hvd.join()}>\\n", end="", flush=True)
print("small", end=" ")
for count in range(2):
    model = torch.nn.Linear(2, 3)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("doors") / "train.py"
    script.write_text(DOORS)
    command = python(*RUNNER, "--compression", "topk", "--ratio", "10", "--warmup-steps", "0", script)
    completed = launch(2, command)
    assert completed.returncode == 0, completed.output
    return completed.output


def test_the_scripts_optimizer_is_compressed_by_whatever_name_it_comes(doors: str) -> None:
    """The last step is one that a rank has joined before: what is compressed is then sent whole, and not before."""
    found = re.findall(r"<([\w ]+)\|(\d+)\|(\w+)\|(\d)>", doors)
    names = {name for name, *_ in found}
    assert len(names) == 6
    for name in names:
        joined, last = sorted(int(nonzero) for other, nonzero, *_ in found if other == name)
        assert last <= 57 if name == "own compressor" else 50 < joined < 3050 // 2 < last
    assert {tuple(rest) for _, _, *rest in found} == {("SGD", "1")}


def test_a_model_that_is_too_small_trains_dense_and_one_rank_says_so(doors: str) -> None:
    assert doors.count("hvd_sketch: the model is too small to compress and trains dense: ") == 2


WORKERS = """
import horovod, horovod.torch as hvd
from horovod.torch import DistributedOptimizer

def train(settings):
    import torch
    hvd.init()
    model = torch.nn.Linear(100, 100)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), **settings), model.named_parameters())
    return hvd.rank(), type(optimizer.exchange).__name__

if __name__ == "__main__":
    print(horovod.run(train, ({"lr": 0.1},), np=1, use_gloo=True))
"""


def test_workers_of_horovod_run_are_seen(tmp_path: Path) -> None:
    completed = run_script(tmp_path, WORKERS)
    assert completed.returncode == 0, completed.output
    assert "[(0, 'SketchExchange')]" in completed.output
    assert "nothing was compressed" not in completed.output


def test_a_script_that_wraps_nothing_is_told_at_its_end(tmp_path: Path) -> None:
    completed = run_script(tmp_path, "print('the end')\nraise SystemExit")
    assert completed.returncode == 0
    first, second = completed.output.splitlines()
    assert first == "the end"
    assert second.startswith("hvd_sketch: nothing was compressed: the script wrapped no optimizer in ")


@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_without_sparsifying_everything_is_sent(tmp_path: Path, compression: str) -> None:
    told = train(tmp_path, HALF_PRECISION.format(""), ["--compression", compression])
    assert int(told.split()[1]) > 3000


def test_what_the_script_may_not_combine_is_told(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(made=HALF_PRECISION.format("op=hvd.Adasum, "), imported="sys"))
    completed = run(python(*RUNNER, *SKETCH, str(script)))
    assert completed.returncode != 0
    assert "op=Adasum cannot be combined with compression: only Average and Sum are linear" in completed.output
