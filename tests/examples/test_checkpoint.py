"""Checkpoints of the examples are whole whenever a run is killed, and damage is noticed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.examples.test_examples import SKETCH, command, latest
from tests.support.ranks import ROOT, end, launch, python, run

SAVING = """
import os, random, signal, sys, time
from pathlib import Path
sys.modules["horovod"] = None
sys.path.insert(0, {examples!r})
import torch
import hvd_sketch as hvd
from harness import checkpoint
hvd.init()
torch.set_num_threads(1)

def made():
    model = torch.nn.Linear(200, 300)
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    compressor = hvd.Compression.topk(ratio=10.0)
    return model, hvd.DistributedOptimizer(inner, model.named_parameters(), compressor, comm=hvd.SingleProcess())

def save_for_ever(first):
    model, optimizer = made()
    for step in range(first, 10**9):
        with torch.no_grad():
            model.weight.fill_(step)
        checkpoint.save(folder, step, model, optimizer, {{"of": step}})

folder, dice, step = Path(sys.argv[1]), random.Random(7), 0
checkpoint.save(folder, 0, *made(), {{"of": 0}})
for kill in range(12):
    child = os.fork()
    if child == 0:
        save_for_ever(step + 1)
    time.sleep(dice.uniform(0.0, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    model, optimizer = made()
    before, (step, record) = step, checkpoint.load(folder, model, optimizer)
    assert step >= before and record == {{"of": step}}
    assert step == 0 or bool((model.weight == step).all()), (step, model.weight)
    assert len(list(folder.glob("*-step-*"))) <= 3
print("reached step", step)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    completed = run(python("-c", SAVING.format(examples=str(ROOT / "examples")), tmp_path))
    assert completed.returncode == 0, completed.output
    assert int(completed.output.split("reached step")[1]) > 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left that saved after every step and were killed after some of them."""
    folder = tmp_path_factory.mktemp("killed")
    words = ("mpirun", "--oversubscribe", "--bind-to", "none", "-np", "2")
    script = command("digits_cnn", *SKETCH, "--steps", 10_000, "--eval-every", "1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*words, *script, "--save", str(folder)], env=environment, stderr=subprocess.DEVNULL
    ) as ranks:
        deadline = time.monotonic() + 90
        while len(list(folder.glob("*-step-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(random.Random(3).uniform(0.0, 1.0))
        ranks.send_signal(signal.SIGKILL)
        end(ranks)
    return folder


def test_killed_ranks_resume(killed: Path) -> None:
    steps = int(latest(killed).name.split("-")[-1])
    together = launch(2, command("digits_cnn", *SKETCH, "--steps", steps + 2, "--resume", killed))
    assert together.returncode == 0, together.output


@pytest.mark.parametrize(("file", "rank"), [("memory.1.pt", 1), ("model.pt", 0)])
def test_a_flipped_bit_is_noticed_by_all_ranks(killed: Path, file: str, rank: int) -> None:
    damaged = latest(killed) / file
    content = bytearray(damaged.read_bytes())
    whole = bytes(content)
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    try:
        together = launch(2, command("digits_cnn", *SKETCH, "--steps", 9, "--resume", killed))
    finally:
        damaged.write_bytes(whole)
    assert together.returncode != 0
    assert f"rank {rank}: cannot resume: {damaged} is damaged" in together.output
    assert f"rank {1 - rank}: cannot resume: another rank cannot" in together.output
