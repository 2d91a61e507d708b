"""Without Horovod: the same scripts over mpi4py, over torchrun, and in a process that no launcher started."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.support.broadcasting import broadcast_odd_types
from tests.support.ranks import Launcher, launch, python, ranks, run
from tests.support.training import COMPRESSED, flat, loss, net, train

FORBID_HOROVOD = "import sys; sys.modules['horovod'] = None\n"
FORBID_BOTH = FORBID_HOROVOD + "sys.modules['mpi4py'] = None\n"
SCRIPT = (
    FORBID_HOROVOD
    + """
import torch
import hvd_sketch as hvd
hvd.init()
model = torch.nn.Linear(50, 40)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=hvd.Compression.sketch(ratio=5))
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
for step in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 50)).square().mean().backward()
    optimizer.step()
print("rank", hvd.rank(), "of", hvd.size(), "sum", model.weight.sum().item())
"""
)


def forbid_horovod() -> Any:
    """Hide Horovod from this process, and import our library as a script would."""
    assert "horovod.torch" not in sys.modules
    sys.modules["horovod"] = None  # type: ignore[assignment]
    import hvd_sketch

    return hvd_sketch


class Seen(NamedTuple):
    """What one rank saw."""

    place: tuple[int, int, int, int]
    state: dict[str, Tensor]
    momentum: list[Tensor]
    objects: Any
    reduced: list[Tensor]
    ends: dict[str, tuple[Tensor, Tensor]]
    told: str
    joined: tuple[list[int], Tensor]
    odd_types: list[list[Tensor]]


def end(hvd: Any, compression: Any, settings: dict[str, Any], **keywords: Any) -> Tensor:
    model = net()
    inner = torch.optim.SGD(model.parameters(), 0.1, **settings)
    return train(
        hvd.DistributedOptimizer(inner, model.named_parameters(), compression, **keywords), model, 6, hvd.rank()
    )


def averaged(size: int, settings: dict[str, Any], *, half: bool = False) -> Tensor:
    """What averaging the gradients gives, computed here for all ranks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, **settings)
    for step in range(6):
        gradients = [torch.autograd.grad(loss(model, rank, step), list(model.parameters())) for rank in range(size)]
        for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack([part.half().float() if half else part for part in parts]).mean(0)
        optimizer.step()
    return flat(model)


def uneven(hvd: Any) -> tuple[list[int], Tensor]:
    """Two epochs in which rank 1 has more batches, and rank 0 at first none; who joined last, and the model."""
    model = net()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), hvd.Compression.topk(ratio=10.0))
    lasts = []
    for count in (3 * hvd.rank(), 2 + hvd.rank()):
        train(optimizer, model, count, hvd.rank())
        lasts.append(hvd.join())
    return lasts, flat(model)


def script() -> Seen:
    """What a training script uses of ``horovod.torch``."""
    hvd = forbid_horovod()
    assert not hvd.is_initialized()
    hvd.init(process_sets="dynamic")
    assert hvd.is_initialized()
    rank, size, joined = hvd.rank(), hvd.size(), uneven(hvd)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model(torch.full((2, 2, 4, 4), 1.0 + rank))
    model[1].num_batches_tracked.fill_(5 + rank)
    hvd.broadcast_parameters(model.state_dict(), root_rank=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer: Any = torch.optim.SGD(model.parameters(), 0.1 * (1 + rank), momentum=0.9)
    if rank == 0:
        model(torch.ones(2, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    momentum = [entry["momentum_buffer"] for entry in optimizer.state_dict()["state"].values()]
    momentum.append(torch.tensor(optimizer.param_groups[0]["lr"]))
    reduced = [hvd.allreduce(torch.tensor([1.0 + rank]), name="mean"), hvd.allreduce(torch.ones(2, 2), op=hvd.Sum)]
    everything = hvd.Compression.sketch(cols=COMPRESSED, k=COMPRESSED, half=False, clip_norm=None)
    sketch = hvd.Compression.sketch(ratio=10.0, warmup_steps=2)
    momentum_settings = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    dense = averaged(size, momentum_settings)
    corrected = {"momentum_correction": True, "momentum_masking": False}
    ends = {
        "none": (end(hvd, hvd.Compression.none, momentum_settings), dense),
        "none, momentum correction": (end(hvd, hvd.Compression.none, momentum_settings, **corrected), dense),
        "fp16": (end(hvd, hvd.Compression.fp16, {}), averaged(size, {}, half=True)),
        "everything": (end(hvd, everything, momentum_settings), dense),
        "everything, momentum correction": (end(hvd, everything, momentum_settings, **corrected), dense),
        "sketch": (end(hvd, sketch, {}),) * 2,
    }
    told = ""
    fresh = net()
    other = hvd.Compression.sketch(ratio=10.0 + rank, warmup_steps=0)
    mismatched = hvd.DistributedOptimizer(torch.optim.SGD(fresh.parameters(), 0.1), fresh.named_parameters(), other)
    try:
        train(mismatched, fresh, 1)
    except hvd.RankMismatchError as error:
        told = str(error)
    odd_types = broadcast_odd_types(hvd)
    hvd.shutdown()
    assert not hvd.is_initialized()
    place = rank, size, hvd.local_rank(), hvd.local_size()
    return Seen(
        place, state, momentum, hvd.broadcast_object({"from": rank}, 1), reduced, ends, told, joined, odd_types
    )


@pytest.fixture(scope="module")
def seen_by() -> Mapping[Launcher, list[Seen]]:
    return {"mpirun": ranks(2, script), "torchrun": ranks(2, script, launcher="torchrun")}


@pytest.fixture(params=["mpirun", "torchrun"])
def seen(seen_by: Mapping[Launcher, list[Seen]], request: pytest.FixtureRequest) -> list[Seen]:
    return seen_by[request.param]


def test_the_names_that_scripts_use_work(seen: list[Seen]) -> None:
    for rank, one in enumerate(seen):
        assert one.place == (rank, 2, rank, 2)
        assert one.objects == {"from": 1}
        assert one.reduced[0].item() == 1.5
        assert torch.equal(one.reduced[1], torch.full((2, 2), 2.0))
        assert one.state["1.num_batches_tracked"].item() == 6
        assert one.momentum[-1].item() == pytest.approx(0.1)
        assert all(torch.equal(one.state[name], tensor) for name, tensor in seen[0].state.items())
        assert all(torch.equal(a, b) for a, b in zip(one.momentum, seen[0].momentum, strict=True))
    assert len(seen[0].momentum) == 5


def test_parameters_and_states_of_every_type_are_broadcast(seen: list[Seen]) -> None:
    torch.testing.assert_close(seen[0].odd_types, seen[1].odd_types, rtol=0, atol=0)


def test_ranks_with_fewer_batches_join_over_mpi4py(seen: list[Seen]) -> None:
    assert all(one.joined[0] == [1, 1] for one in seen)
    assert torch.equal(seen[0].joined[1], seen[1].joined[1])


@pytest.mark.parametrize(
    "name", ["none", "none, momentum correction", "fp16", "everything", "everything, momentum correction", "sketch"]
)
def test_training_is_what_it_should_be(seen: list[Seen], name: str) -> None:
    for one in seen:
        assert torch.equal(one.ends[name][0], seen[0].ends[name][0])
        torch.testing.assert_close(*one.ends[name], rtol=1e-3 if name == "fp16" else 1e-5, atol=1e-5)


def test_ranks_that_differ_are_told(seen: list[Seen]) -> None:
    assert seen[0].told == seen[1].told
    assert "settings: rank 0 has 'ratio=10.0,', rank 1 has 'ratio=11.0,'" in seen[0].told


def test_a_run_under_torchrun_equals_that_under_mpirun(seen_by: Mapping[Launcher, list[Seen]]) -> None:
    """To rounding: sums over more than two ranks may be taken in another order."""
    for name, (end, _) in seen_by["mpirun"][0].ends.items():
        torch.testing.assert_close(seen_by["torchrun"][0].ends[name][0], end, rtol=1e-5, atol=1e-6)


def hooks_in_another_order_on_each_rank() -> Tensor:
    """Two optimizers whose first hooks fire in another order on each rank; one rank has no gradient of the second."""
    hvd = forbid_horovod()
    models = [net(1), net(2)]
    compressor = hvd.Compression.sketch(ratio=10.0, warmup_steps=0)
    optimizers = [
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), compressor)
        for model in models
    ]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for model in models if hvd.rank() else models[:1] if step == 2 else reversed(models):
            loss(model, hvd.rank(), step).backward()
        for optimizer in optimizers:
            optimizer.step()
    return torch.cat([flat(model) for model in models])


def test_hook_orders_do_not_mix_two_optimizers() -> None:
    """The fifteen, item 1, over mpi4py, whose messages have no names."""
    first, second, third = ranks(3, hooks_in_another_order_on_each_rank)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_a_process_without_launcher_trains_alone() -> None:
    completed = run([sys.executable, "-c", SCRIPT])
    assert completed.returncode == 0, completed.output
    assert "rank 0 of 1" in completed.output


def test_launched_processes_find_each_other() -> None:
    completed = launch(2, python("-c", SCRIPT))
    assert completed.returncode == 0, completed.output
    sums = [line.split("sum")[1] for line in completed.output.splitlines() if "of 2 sum" in line]
    assert len(sums) == 2
    assert sums[0] == sums[1]


def test_launched_processes_that_cannot_connect_are_refused() -> None:
    """Training alone on every rank would be silent."""
    program = FORBID_BOTH + "import hvd_sketch as hvd\nhvd.init()"
    completed = launch(2, python("-c", program))
    assert completed.returncode != 0
    assert "2 processes were launched but neither Horovod nor mpi4py is installed" in completed.output
    assert "pip install mpi4py" in completed.output


def test_every_name_of_horovod_is_there_or_says_what_it_needs() -> None:
    stock = importlib.import_module("horovod.torch")
    public = {name for name in dir(stock) if not name.startswith("_")} - {"check_extension"}
    names = sorted(name for name in public if name == "elastic" or not isinstance(getattr(stock, name), ModuleType))
    program = f"""{FORBID_HOROVOD}
import hvd_sketch as hvd, torch
for name in {names}:
    getattr(hvd, name)
adasum = lambda: hvd.allreduce(torch.ones(1), op=hvd.Adasum)
for use in (lambda: hvd.elastic.run, hvd.ProcessSet, hvd.SyncBatchNorm, adasum):
    try:
        use()
    except hvd.ConfigurationError as error:
        print(error)
hvd.nonsense
"""
    completed = run(python("-c", program))
    assert completed.returncode == 1
    for name in ("hvd.elastic", "hvd.ProcessSet", "hvd.SyncBatchNorm", "op=Adasum"):
        assert f"{name} needs Horovod" in completed.output
    assert "hvd_sketch has no attribute 'nonsense'" in completed.output


def test_importing_us_does_not_import_horovod() -> None:
    """A broken Horovod must not break what does not use it."""
    program = "import sys, hvd_sketch; assert not any(name.startswith('horovod') for name in sys.modules)"
    completed = run([sys.executable, "-c", program])
    assert completed.returncode == 0, completed.output


def test_unmodified_scripts_need_horovod() -> None:
    program = FORBID_HOROVOD + "from hvd_sketch.frontends.run_script import main\nmain([sys.executable])"
    completed = run(python("-c", program))
    assert completed.returncode != 0
    assert "only where Horovod is installed" in completed.output
