"""Accuracy at a real size: ranks on one model train as ranks with a model each do, and rows are kept."""

from __future__ import annotations

import copy
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy.large import command
from benchmarks.accuracy.large.model import SMALL, loss_of
from benchmarks.accuracy.large.text import Text
from benchmarks.accuracy.large.train import Method, Plan, SharedRanks, train
from hvd_sketch import Anticipate, Compression, DistributedOptimizer, FactoredMoments
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process

RANKS, STEPS = 2, 5
SHARDED = Compression.sharded(ratio=20.0, warmup_steps=0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    text = Text.read(torch.device("cpu"), 200_000)
    return Plan(SMALL, text, RANKS, STEPS, seed=0, until=time.monotonic() + 1000.0)


def trained_apart(plan: Plan, method: Method) -> Tensor:
    """By a model and a distributed optimizer for each rank."""
    start = plan.model()

    def body(comm: Communicator) -> Tensor:
        model = copy.deepcopy(start)
        settings: dict[str, Any] = {"compression": method.compressor, "error_feedback": method.anticipate}
        optimizer: Any = DistributedOptimizer(plan.optimizer(model), model.named_parameters(), comm=comm, **settings)
        for batch in plan.batches(comm.rank):
            optimizer.zero_grad()
            with optimizer.step_ahead() if method.anticipate else nullcontext():
                loss_of(model, batch).backward()
            optimizer.step()
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    return run_in_process(plan.ranks, body)[0]


@pytest.mark.parametrize(
    "method",
    [
        Method(SHARDED),
        Method(SHARDED, Anticipate()),
        Method(SHARDED, Anticipate(second_moments=FactoredMoments())),
        Method(Compression.sketch(ratio=20.0, warmup_steps=0, in_turn=0.75, dense_below=0), Anticipate()),
    ],
)
def test_ranks_on_one_model_train_as_ranks_with_a_model_each(plan: Plan, method: Method) -> None:
    model = plan.model()
    ranks = SharedRanks(model, method, plan)
    for batches in zip(*(plan.batches(rank) for rank in range(RANKS)), strict=True):
        ranks.step(list(batches))
    ours = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.equal(ours, trained_apart(plan, method))


def test_a_training_ends_when_its_time_is_over(plan: Plan) -> None:
    over = Plan(plan.size, plan.text, RANKS, 1000, seed=0, until=time.monotonic())
    for method in (Method(), Method(SHARDED, period=2)):
        outcome = train(method, over)
        assert [steps for steps, _, _ in outcome.losses] == [83]


def test_rows_are_kept_and_what_is_missing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: command.METHODS[name] for name in ("dense", "soft sign, mixed by dct", "powersgd", "local SGD")}
    monkeypatch.setattr(command, "METHODS", few)
    out = tmp_path / "large.json"
    arguments = ["--size", "small", "--device", "cpu", "--ranks", "2", "--steps", "9", "--out", str(out)]
    command.main([*arguments, "--minutes", "0"])
    command.main(arguments)
    rows = json.loads(out.read_text())
    assert len(rows) == 10
    assert all(row["finished"] for row in rows)
    (mixed,) = (row for row in rows if (row["method"], row["setting"]) == ("soft sign, mixed by dct", 40.0))
    assert mixed["ratio"] == pytest.approx(40.0, rel=0.1)
    rows[2]["finished"] = False
    out.write_text(json.dumps(rows))
    command.main(arguments)
    again = json.loads(out.read_text())
    assert len(again) == 10
    assert all(row["finished"] for row in again)
    assert again[-1]["losses"] == rows[2]["losses"]
