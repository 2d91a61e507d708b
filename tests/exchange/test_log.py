"""What a user sees of an exchange: two lines, on rank 0, and the counters as plain numbers."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvd_sketch import Compression, Stats
from hvd_sketch.comm import SingleProcess
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.compressors import Compressor, PowerSGD, Sharded
from tests.support.compressors import EVERY, SHARDED
from tests.support.methods import METHODS, fresh, train
from tests.support.ranks import launch, python
from tests.support.simulation import drive, heavy_tailed, make, simulate

TOTAL = 5470
COST = r"([\d.,]+) MB sent in place of ([\d.,]+) MB \(([\d.,]+) times less\)"
FIRST = re.compile(
    rf"hvd_sketch: step (\d+) is the first compressed one: (.+) on (\d+) ranks; {COST} a step and rank; (.+)"
)
LAST = re.compile(rf"hvd_sketch: the end after (\d+) steps, (\d+) of them void: {COST}, in all; (.+)")


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """What has been told since the test began, of exchanges that nobody refers to any more."""

    def told() -> list[str]:
        gc.collect()
        return [record.getMessage() for record in caplog.records if record.name == "hvd_sketch"]

    told()
    caplog.clear()
    return told


def found(pattern: re.Pattern[str], line: str) -> tuple[str, ...]:
    match = pattern.fullmatch(line)
    assert match, line
    return match.groups()


@EVERY
def test_rank_0_tells_once_at_the_first_compressed_step_and_once_at_the_end(
    compressor: Compressor, lines: Lines
) -> None:
    gradients = heavy_tailed(3, 6, TOTAL)
    gradients[1, 4, 7] = float("nan")
    with pytest.warns(UserWarning, match="is void"):
        runs = simulate(compressor, gradients)
    layout, stats = runs[0].exchange.layout, runs[0].exchange.stats
    del runs
    first, last = lines()
    step, name, ranks, sent, dense, _, rest = found(FIRST, first)
    assert (step, ranks) == ("3" if isinstance(compressor, PowerSGD) else "1", "3")
    assert name.startswith(("Sharded(", "Sketch(")) if type(compressor).__name__ == "Auto" else name == str(compressor)
    assert rest.startswith(f"{layout.compressed:,} parameters compressed, {layout.dense:,} sent whole")
    assert 1.2 * float(sent) < float(dense) == round(2 * (3 - 1) / 3 * 4 * TOTAL / 1e6, 3)
    end = f"{stats.bytes_sent / 1e6:,.3f}", f"{stats.dense_bytes / 1e6:,.3f}", f"{stats.ratio:.1f}"
    assert found(LAST, last) == ("6", "1", *end, name)


def test_an_exchange_that_never_stepped_or_had_nobody_to_send_to_tells_nothing(lines: Lines) -> None:
    drive(SingleProcess(), SHARDED, heavy_tailed(4, TOTAL))
    run_in_process(2, lambda comm: make(SHARDED, comm))
    assert lines() == []


def test_a_run_that_ends_within_the_warmup_tells_its_end_alone(lines: Lines) -> None:
    simulate(replace(SHARDED, warmup_steps=100), heavy_tailed(2, 3, TOTAL))
    (last,) = lines()
    assert found(LAST, last)[:2] == ("3", "0")


def test_the_first_compressed_step_comes_with_the_warmups_end_in_sight(lines: Lines) -> None:
    simulate(replace(SHARDED, warmup_steps=8), heavy_tailed(2, 5, TOTAL))
    first, _ = lines()
    assert found(FIRST, first)[0] == "3"
    assert "the ratio is 10 from step 8 on" in first


def test_a_pattern_that_excludes_nothing_is_told(lines: Lines) -> None:
    simulate(Sharded(ratio=8.0, exclude=("a.?ias", "a.w", "*.norms")), heavy_tailed(2, 2, TOTAL))
    first, _ = lines()
    assert re.findall("exclude='([^']*)' matches no parameter", first) == ["a.w", "*.norms"]


@pytest.mark.parametrize(("ratio", "member"), [(10.0, "Sharded"), (90.0, "Sketch")])
def test_auto_tells_what_it_chose_and_why(ratio: float, member: str, lines: Lines) -> None:
    simulate(Compression.auto(ratio=ratio, warmup_steps=0), heavy_tailed(8, 1, TOTAL))
    first, _ = lines()
    code = 4 * TOTAL / ratio / 8
    assert found(FIRST, first)[1].split("(")[0] == member
    assert f"auto chose {member}: there are {code:.0f} bytes for each owner of Sharded, which needs 36" in first


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("exchange", "error_feedback=None"),
        ("anticipate", r"error_feedback=Anticipate\(coefficient=0.6, second_moments=None\)"),
        ("anticipate, adamw", r"error_feedback=Anticipate\(coefficient=1.0, second_moments=None\)"),
        ("step ahead by half", r"error_feedback=StepAhead\(coefficient=0.5, averaging_period=3\)"),
        ("local sgd, diloco", "LocalSGD, in every 3 steps"),
        ("cser, partial", "CSER, its errors"),
    ],
)
def test_methods_tell_what_they_are(name: str, note: str, lines: Lines) -> None:

    def body(comm: Any) -> None:
        model, optimizer = fresh(METHODS[name], comm)
        train(optimizer, model, comm.rank, range(4))

    run_in_process(2, body)
    first, _ = lines()
    assert re.search(f"; {note}(;|$)", first)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("overlap", "OverlapLocalSGD, in every 3 steps"),
        ("dmsgd", "DmSGD with 2 neighbours at most"),
        ("lead", "LEAD with 2 neighbours at most"),
    ],
)
def test_methods_without_an_exchange_tell_as_much(name: str, label: str, lines: Lines) -> None:
    def body(comm: Any) -> None:
        model, optimizer = fresh(METHODS[name], comm)
        train(optimizer, model, comm.rank, range(7))
        optimizer.finish()

    run_in_process(3, body)
    first, last = lines()
    pattern = re.compile(rf"hvd_sketch: (.+) on 3 ranks has sent its first message, in step \d+: {COST} until then")
    assert found(pattern, first)[0] == label
    assert found(LAST, last)[0] == "7"
    assert last.endswith(label)


def test_counters_are_plain_numbers() -> None:
    stats = simulate(SHARDED, heavy_tailed(2, 3, TOTAL))[0].exchange.stats
    numbers = stats.as_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    for name, value in numbers.items():
        phase = name.removeprefix("seconds_")
        assert value == (stats.seconds[phase] if phase != name else getattr(stats, name))
    assert {"steps", "skipped", "bytes_sent", "dense_bytes", "ratio", "captured_energy", "clip"} < set(numbers)
    assert Stats().as_dict()["steps"] == 0


SCRIPT = """
import json, logging
import horovod.torch as hvd
import torch
import hvd_sketch

hvd.init()
compression = hvd_sketch.Compression.auto(ratio=10, warmup_steps=0)
model = torch.nn.Linear(60, 40)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
inner = torch.optim.SGD(model.parameters(), 0.1)
optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=compression)
for step in range(5):
    optimizer.zero_grad()
    model(torch.randn(8, 60)).square().mean().backward()
    optimizer.step()
    if step == 2:
        logging.basicConfig(format="configured %(name)s: %(message)s")
print("steps", hvd.rank(), json.dumps(hvd_sketch.exchange_of(compression).stats.as_dict()["steps"]))
"""


def test_a_script_that_just_ends_sees_both_lines_before_and_after_it_configures_logging(tmp_path: Path) -> None:
    """Under stock Horovod, on real ranks."""
    (tmp_path / "script.py").write_text(SCRIPT)
    status, output = launch(2, python(tmp_path / "script.py"))
    assert status == 0, output
    first, last = [line for line in output.splitlines() if "hvd_sketch: " in line]
    assert re.search("(^|:)hvd_sketch: step 1 is .*; stock Horovod; error_feedback=Anticipate", first)
    assert re.search("(^|:)configured hvd_sketch: hvd_sketch: the end after 5 steps, 0 of them void", last)
    assert all(f"steps {rank} 5" in output for rank in range(2))


def test_the_level_of_our_logger_silences_both(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "hvd_sketch")
    simulate(SHARDED, heavy_tailed(2, 2, TOTAL))
    assert lines() == []
