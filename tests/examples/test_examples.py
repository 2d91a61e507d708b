"""The examples run on real ranks, as their documentation says, and a resumed run equals an uninterrupted one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import ROOT, launch, python, run

SCRIPTS = {
    "char_transformer": ("--batch-size", "2", "--eval-every", "3"),
    "digits_cnn": ("--batch-size", "8", "--eval-every", "3"),
}
SKETCH = ("--compression", "sketch", "--ratio", "10", "--warmup-steps", "2")
SHARDED = ("--compression", "sharded", "--ratio", "10", "--warmup-steps", "2", "--no-anticipate")
SPARSE = {"char_transformer": SHARDED, "digits_cnn": SKETCH}
COSTS = ("seconds", "bytes")
WITHOUT_HOROVOD = "import runpy, sys; sys.modules['horovod'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"


def command(name: str, *options: object) -> list[str]:
    return python(ROOT / "examples" / f"{name}.py", *SCRIPTS[name], *options)


def succeed(name: str, *options: object, ranks: int = 2) -> str:
    completed = launch(ranks, command(name, *options))
    assert completed.returncode == 0, completed.output
    return completed.output


def records(path: Path) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads(path.read_text())
    return loaded


@pytest.fixture(scope="module", params=list(SCRIPTS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """An example after 6 sparse steps on 2 ranks, compared with 6 dense ones: (name, folder, output)."""
    folder = tmp_path_factory.mktemp(request.param)
    files = ("--save", folder, "--results", folder / "results.json", "--plot", folder / "curves.png")
    return request.param, folder, succeed(request.param, *SPARSE[request.param], "--steps", 6, *files)


def test_compares_with_a_dense_run_in_a_table_a_file_and_a_picture(trained: tuple[str, Path, str]) -> None:
    _, folder, output = trained
    dense, sparse = records(folder / "results.json")
    assert dense["steps"] == sparse["steps"] == [3, 6]
    assert dense["bytes"][-1] == dense["dense_bytes"] == sparse["dense_bytes"]
    assert 0 < sparse["bytes"][-1] < dense["bytes"][-1]
    assert {"select", "exchange", "compute"} <= sparse["seconds"].keys()
    assert f"{sparse['values'][-1]:.4f}" in output
    assert "% against dense" in output
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_resumed_run_equals_an_uninterrupted_one(trained: tuple[str, Path, str], tmp_path: Path) -> None:
    name, folder, _ = trained
    succeed(name, *SPARSE[name], "--steps", 3, "--save", tmp_path)
    succeed(name, *SPARSE[name], "--steps", 6, "--resume", tmp_path, "--save", tmp_path)
    for part in ("model.pt", "memory.0.pt", "memory.1.pt"):
        files = (latest(place) / part for place in (folder, tmp_path))
        uninterrupted, resumed = (torch.load(file, weights_only=True) for file in files)
        assert identical(resumed, uninterrupted), part


def latest(folder: Path) -> Path:
    """The checkpoint that counts."""
    return folder / (folder / "latest").read_text()


def identical(one: Any, other: Any) -> bool:
    """Whether two saved states agree in every bit, but for what they cost: a resumed run compares settings again."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one if key not in COSTS)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)


def test_takes_a_recorded_baseline_of_the_same_training_only(tmp_path: Path) -> None:
    baseline = tmp_path / "dense.json"
    succeed("digits_cnn", "--steps", 3, "--results", baseline)
    sparse = ("--compression", "topk", "--ratio", 10, "--steps", 3, "--baseline", baseline)
    assert "topk, ratio 10" in succeed("digits_cnn", *sparse)
    alone = run(command("digits_cnn", *sparse))
    assert alone.returncode != 0
    assert "was trained with ranks=2, this run has 1" in alone.output


def test_runs_over_mpi4py_without_horovod(tmp_path: Path) -> None:
    script = command("digits_cnn", *SKETCH, "--steps", 6, "--results", tmp_path / "results.json")[1:]
    prelude = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT / 'examples')!r}); {WITHOUT_HOROVOD}"
    completed = launch(2, python("-c", prelude, *script))
    assert completed.returncode == 0, completed.output
    (sketched,) = records(tmp_path / "results.json")
    assert sketched["settings"]["ranks"] == 2
    assert 0 < sketched["bytes"][-1] < sketched["dense_bytes"]


def test_runs_under_horovodrun_with_half_precision(tmp_path: Path) -> None:
    script = command("digits_cnn", "--compression", "fp16", "--steps", 3, "--results", tmp_path / "results.json")
    completed = launch(2, script, launcher="horovodrun-gloo")
    assert completed.returncode == 0, completed.output
    (half,) = records(tmp_path / "results.json")
    assert half["dense_bytes"] == 2 * half["bytes"][-1]


def test_one_ranks_checkpoint_is_refused_by_two(tmp_path: Path) -> None:
    alone = run(command("digits_cnn", *SKETCH, "--steps", 3, "--save", tmp_path))
    assert alone.returncode == 0, alone.output
    together = launch(2, command("digits_cnn", *SKETCH, "--steps", 6, "--resume", tmp_path))
    assert together.returncode != 0
    assert f"rank 1: cannot resume: there is no {latest(tmp_path) / 'memory.1.pt'}" in together.output


def test_the_demo_trains_twice_and_tells_the_gap(tmp_path: Path) -> None:
    outputs = ("--results", str(tmp_path / "results.json"), "--plot", str(tmp_path / "curves.png"))
    sizes = ("--steps", "3", "--batch-size", "1")
    completed = run(python(ROOT / "examples" / "demo.py", *sizes, *outputs))
    assert completed.returncode == 0, completed.output
    assert "% against dense" in completed.output
    assert "2 ranks over Horovod" in completed.output
    assert str(tmp_path / "curves.png") in completed.output
