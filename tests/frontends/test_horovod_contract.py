"""Horovod's documented pattern, unchanged, in all ways that this library is used, under mpirun and horovodrun."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.ranks import Launcher, launch, python

SCRIPT = Path(__file__).parent.parent / "scripts" / "documented_pattern.py"
RUNNER = ["-m", "hvd_sketch", "--compression", "sketch", "--ratio", "10", "--warmup-steps", "4"]
SKETCH = "hvd_sketch.Compression.sketch(ratio=10.0, warmup_steps=4)"
IMPORT, OPTIMIZER = "import horovod.torch as hvd\n", "optimizer = hvd.DistributedOptimizer("
CHOICE = "compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none\n"
WAYS: dict[str, dict[str, str]] = {
    "run unmodified": {},
    "import ours": {
        IMPORT: "import hvd_sketch as hvd\n",
        CHOICE: f"compression = {SKETCH.replace('hvd_sketch', 'hvd')}\n",
    },
    "stock optimizer": {IMPORT: f"{IMPORT}import hvd_sketch\n", CHOICE: f"compression = {SKETCH}\n"},
    "our optimizer": {
        IMPORT: f"{IMPORT}import hvd_sketch\n",
        CHOICE: f"compression = {SKETCH}\n",
        OPTIMIZER: OPTIMIZER.replace("hvd", "hvd_sketch"),
    },
}
LINE = re.compile(r"rank=(\d+) epoch=(\d+) loss=([\d.]+) nonzero=(\d+) parameters=(\w+)")
TOTAL = 30 * 60 + 60 + 2 * 60 + 60 * 40 + 40


class Line(NamedTuple):
    """What a rank tells after an epoch."""

    rank: int
    epoch: int
    loss: float
    nonzero: int
    parameters: str


def told(output: str) -> list[Line]:
    found = LINE.findall(output)
    return sorted(Line(int(rank), int(epoch), float(loss), int(n), digest) for rank, epoch, loss, n, digest in found)


def run(way: str, launcher: Launcher, folder: Path, *arguments: str, count: int = 2) -> list[Line]:
    text = SCRIPT.read_text()
    for line, replacement in WAYS[way].items():
        assert text.count(line) == 1
        text = text.replace(line, replacement)
    script = folder / "train.py"
    script.write_text(text)
    command = python(*(RUNNER if way == "run unmodified" else ()), script, *arguments)
    completed = launch(count, command, launcher=launcher)
    assert completed.returncode == 0, completed.output
    return told(completed.output)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """Of the unmodified script."""
    return run("run unmodified", "mpirun", tmp_path_factory.mktemp("unmodified"), "--ratio", "0.2", "--fp16-allreduce")


def test_the_script_trains_compressed_and_alike_on_all_ranks(expected: list[Line]) -> None:
    """The fifteen, item 3: on this PyTorch and this Python; the script's own options stay its own."""
    assert [(line.rank, line.epoch) for line in expected] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [line[2:] for line in expected[:2]] == [line[2:] for line in expected[2:]]
    assert expected[1].loss < 0.9 * expected[0].loss
    assert expected[1].nonzero < TOTAL // 4


OTHERS: list[tuple[str, Launcher]] = [
    ("run unmodified", "horovodrun-gloo"),
    ("import ours", "mpirun"),
    ("stock optimizer", "horovodrun-gloo"),
    ("our optimizer", "mpirun"),
]


@pytest.mark.parametrize(("way", "launcher"), OTHERS)
def test_every_way_trains_alike(way: str, launcher: Launcher, tmp_path: Path, expected: list[Line]) -> None:
    """The fifteen, items 2 and 8: stock Horovod as installed, and its broadcasts, in all four ways of use."""
    assert run(way, launcher, tmp_path, "--ratio", "0.2") == expected


def test_three_ranks_train_alike(tmp_path: Path) -> None:
    lines = run("import ours", "mpirun", tmp_path, "--epochs", "1", count=3)
    assert [line.rank for line in lines] == [0, 1, 2]
    assert len({line[2:] for line in lines}) == 1
