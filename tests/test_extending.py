"""The programs of docs/extending.md, taken from the page and run on real ranks."""

from __future__ import annotations

import importlib
import re
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch.comm.in_process import run_in_process
from tests.support.ranks import ROOT, ranks
from tests.support.simulation import drive, heavy_tailed, lost, rounding, simulate
from tests.support.training import flat, loss, net

SIZE, STEPS, TOTAL = 3, 12, 5470
PAGE = ROOT / "docs" / "extending.md"


def unpack(folder: Path) -> list[Path]:
    """Write the page's programs to files of the names that stand in their first lines."""
    programs = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for name, text in programs:
        (folder / name).write_text(text)
    return [folder / name for name, _ in programs]


def from_page(folder: str, module: str) -> Any:
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)


def on_a_rank(folder: str) -> tuple[Tensor, Tensor, Tensor]:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD  # tells a rank its number and the others' port, nothing else
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = comm.bcast(free.getsockname()[1])
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)
    group = from_page(folder, "group").GroupCommunicator()
    compressor = from_page(folder, "random_k").RandomK(ratio=10.0, warmup_steps=0, clip_norm=None)
    updates, exchange = drive(group, compressor, heavy_tailed(SIZE, STEPS, TOTAL)[comm.rank])
    assert 9.5 < exchange.stats.ratio < 10.5
    models = [trained(group, compressor), trained(group, compressor, from_page(folder, "by_rate").ByRate(0.3))]
    dist.destroy_process_group()
    return updates, exchange.memory.residual, torch.cat([flat(model) for model in models])


def trained(comm: Any, compression: Any, feedback: Any = None) -> nn.Module:
    """A model after ten steps through the public optimizer, one of them flushed."""
    model = net()
    optimizer: Any = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0 if feedback else 0.9),
        model.named_parameters(),
        compression=compression,
        comm=comm,
        error_feedback=feedback,
    )
    for step in range(10):
        optimizer.zero_grad()
        x = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with optimizer.step_ahead() if feedback else nullcontext():
            if feedback:
                assert_ahead(optimizer, model, x, feedback.share)
            loss(model, comm.rank, step).backward()
        if step == 5:
            optimizer.flush()
        optimizer.step()
    return model


def assert_ahead(optimizer: Any, model: nn.Module, x: dict[str, Tensor], share: float) -> None:
    """Parameters are where the page's formula has them."""
    residual = optimizer.exchange.memory.residual
    for slot in optimizer.exchange.layout.slots:
        error = residual[slot.offset : slot.stop].view(slot.shape)
        torch.testing.assert_close(model.get_parameter(slot.name).detach(), x[slot.name] - share * 0.1 * error)


def test_the_pages_programs_on_three_real_ranks(tmp_path: Path) -> None:
    files = unpack(tmp_path)
    assert {file.name for file in files} == {"random_k.py", "group.py", "by_rate.py"}
    assert all(len(file.read_text().splitlines()) < 80 for file in files)
    seen = ranks(SIZE, on_a_rank, str(tmp_path))
    gradients = heavy_tailed(SIZE, STEPS, TOTAL)
    for updates, _, model in seen[1:]:
        assert torch.equal(updates, seen[0][0])
        assert torch.equal(model, seen[0][2])
    residuals = [residual for _, residual, _ in seen]
    assert (lost(gradients, seen[0][0], residuals) <= rounding(gradients)).all()
    assert all(residual.any() for residual in residuals)


def test_the_pages_compressor_obeys_the_laws(tmp_path: Path) -> None:
    unpack(tmp_path)
    random_k = from_page(str(tmp_path), "random_k").RandomK
    gradients = heavy_tailed(4, 5, TOTAL)
    everything = simulate(random_k(schedule=lambda step: 1.0, clip_norm=None), gradients)[0].updates
    torch.testing.assert_close(everything, gradients.mean(0), rtol=1e-5, atol=1e-5)
    models = run_in_process(2, lambda comm: flat(trained(comm, random_k(ratio=8.0, seed=1))))
    assert torch.equal(*models)
