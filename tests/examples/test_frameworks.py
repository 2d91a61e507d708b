"""The frameworks on top of DistributedDataParallel train with the hook; where they are installed."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

import hvd_sketch as hvd
from tests.support.ranks import ROOT, launch, python, ranks
from tests.support.training import net

pytestmark = pytest.mark.slow  # they import much


def needs(framework: str) -> None:
    """Found, not imported: that takes seconds, and the ranks do it."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {framework}")


@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers"])
def test_a_framework_trains_with_the_hook(name: str) -> None:
    needs(name)
    script = ROOT / "examples" / f"with_{'trainer' if name == 'transformers' else name}.py"
    completed = launch(2, python(script), launcher="torchrun")
    assert completed.returncode == 0, completed.output
    told = re.search(r"after 40 steps, ([0-9.]+) times fewer bytes", completed.output)
    assert told is not None, completed.output
    assert float(told[1]) > 5.0


def resumed(folder: Path) -> bool:
    """Steps after saving, and again after loading, by Accelerate, whose rank 0 writes all memories: the same bits."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
    state = hvd.ddp.register(model, optimizer, hvd.Compression.sharded(ratio=8.0, warmup_steps=0))
    accelerator.register_for_checkpointing(hvd.SavedMemory(state, gathered=True))
    ends: list[torch.Tensor] = []
    for _ in range(2):
        for number in range(6):
            if number == 3 and ends:
                accelerator.load_state(folder)
            elif number == 3:
                accelerator.save_state(folder)
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * number + accelerator.process_index)
            accelerator.backward(model(torch.randn(8, 30, generator=generator)).square().mean())
            optimizer.step()
        ends.append(torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]))
    return torch.equal(*ends)


def test_a_checkpoint_of_accelerate_holds_the_memory_of_every_rank(tmp_path: Path) -> None:
    needs("accelerate")
    assert ranks(2, resumed, tmp_path, launcher="torchrun") == [True, True]


def alone() -> tuple[str, list[str]]:
    """Under horovodrun Accelerate knows of one process: what is said where the hook, or the optimizer, is given."""
    from accelerate import Accelerator

    hvd.init()
    accelerator, model = Accelerator(cpu=True), net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(hvd.ConfigurationError) as refused:
        hvd.ddp.register(model, optimizer, hvd.Compression.sharded(ratio=8.0))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), hvd.Compression.sharded(ratio=8.0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(torch.ones(8, 30)).square().mean().backward()
        optimizer.step()
    return str(refused.value), [str(each.message) for each in told]


def test_processes_of_which_accelerate_does_not_know_are_told() -> None:
    needs("accelerate")
    knows = "Accelerate, on which Trainer builds, knows of one process, and 2 exchange"
    for refused, told in ranks(2, alone, launcher="horovodrun-gloo"):
        assert "torch.distributed connects none of them" in refused
        assert any(knows in each for each in told)
