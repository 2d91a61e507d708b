"""Shards inside a host, exchanged with the replicas of other hosts: four ranks, two by two.

One launch goes through all cases; each test looks at one of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import hvd_sketch as hvd
from hvd_sketch import Anticipate, Compression, ConfigurationError, FactoredMoments
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.shards import local
from tests.support.ranks import ranks
from tests.support.training import flat, loss, net, train

SIZE, STEPS, RATE = 4, 6, 0.125  # a power of two: no product with it is rounded
DENSE: dict[str, Any] = {"ratio": 8.0, "warmup_steps": 10**6, "dense_below": 0}
SPARSE: dict[str, Any] = {"ratio": 8.0, "warmup_steps": 0, "dense_below": 0, "clip_norm": None}
OPTIMIZERS: Mapping[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), RATE, momentum=0.5),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 1e-2),
}
COMPRESSORS: Mapping[str, Callable[[], Any]] = {
    "topk": lambda: Compression.topk(**SPARSE),
    "sharded": lambda: Compression.sharded(**SPARSE),
    "sketch": lambda: Compression.sketch(**SPARSE),
    "powersgd": lambda: Compression.powersgd(rank=2, start_step=0, dense_below=100, clip_norm=None),
}


def sharded(mesh: DeviceMesh) -> nn.Sequential:
    """The 60 rows of the first layer and the 40 of the second, a half on each of two ranks."""
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model


def distributed(model: nn.Module, name: str, compression: Any, comm: Any, **settings: Any) -> Any:
    inner = OPTIMIZERS[name](model)
    return hvd.DistributedOptimizer(inner, model.named_parameters(), compression, comm=comm, **settings)


def whole(model: nn.Module) -> Tensor:
    """The parameters, of all shards together."""
    return torch.cat([p.full_tensor().reshape(-1) for p in model.parameters()]).detach()  # type: ignore[attr-defined]


def mine(model: nn.Module) -> Tensor:
    """This rank's shards."""
    return torch.cat([local(parameter).reshape(-1) for parameter in model.parameters()]).detach().clone()


def by_replica(rank: int) -> tuple[int, int]:
    """The ranks that shard one model."""
    return rank // 2 * 2, rank // 2 * 2 + 1


def step(model: Any, optimizer: Any, clip: float | None) -> None:
    """With the update clipped by the script, if it does that."""
    if clip is None:
        optimizer.step()
        return
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    with optimizer.skip_synchronize():
        optimizer.step()


def trained(mesh: DeviceMesh, name: str, compression: Any, clip: float | None = None, **settings: Any) -> Any:
    """Sharded, each of the four ranks with its own batches."""
    model = sharded(mesh)
    optimizer = distributed(model, name, compression, mesh["replicate"], **settings)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss(model, dist.get_rank(), number).backward()
        step(model, optimizer, clip)
    return model, optimizer


def reference(mesh: DeviceMesh, name: str, compression: Any, clip: float | None = None) -> Tensor:
    """Whole on each of two ranks, which have the batches of those that shard it."""
    model = net()
    optimizer = distributed(model, name, compression, mesh["replicate"])
    for number in range(STEPS):
        optimizer.zero_grad()
        both = [loss(model, rank, number) for rank in by_replica(dist.get_rank())]
        ((both[0] + both[1]) / 2).backward()
        step(model, optimizer, clip)
    return flat(model)


def far(mesh: DeviceMesh, name: str, clip_norm: float | None, clip: float | None) -> float:
    """How far a sharded training ends from the same unsharded one, where everything is sent."""
    compression = Compression.topk(**DENSE, clip_norm=clip_norm)
    model, _ = trained(mesh, name, compression, clip)
    return float((whole(model) - reference(mesh, name, compression, clip)).abs().max())


def conserved(mesh: DeviceMesh, make: Callable[[], Any]) -> tuple[float, float]:
    """Plain SGD: the mean of what was computed less what was stepped with and what is kept, and the last's norm."""
    model = sharded(mesh)
    inner = torch.optim.SGD(model.parameters(), RATE)
    optimizer = hvd.DistributedOptimizer(
        inner, model.named_parameters(), make(), comm=mesh["replicate"], error_feedback=None
    )
    computed, start = {name: torch.zeros_like(local(p)) for name, p in model.named_parameters()}, mine(model)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss(model, dist.get_rank(), number).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            computed[name] += local(parameter.grad)
        optimizer.step()
    residual, slots = optimizer.exchange.memory.residual, optimizer.exchange.layout.slots
    kept = {slot.name: residual[slot.offset : slot.stop] for slot in slots}
    both = torch.stack([torch.cat([part[name].reshape(-1) for name in computed]) for part in (computed, kept)])
    dist.all_reduce(both, group=mesh["replicate"].get_group())
    sent = (start - mine(model)) / RATE
    return float((both[0] / 2 - both[1] / 2 - sent).norm() / both[0].norm()), float(both[1].norm())


def voided(mesh: DeviceMesh) -> tuple[bool, int]:
    """A shard of rank 0 alone is not finite in one step: whether that changed nothing, and how many were skipped."""
    model = sharded(mesh)
    optimizer = distributed(model, "AdamW", Compression.topk(**SPARSE), mesh["replicate"])
    for number in range(3):
        optimizer.zero_grad()
        loss(model, dist.get_rank(), number).backward()
        first = next(model.parameters())
        assert first.grad is not None
        if number == 2 and dist.get_rank() == 0:
            local(first.grad)[0, 0] = torch.inf
        before = mine(model)
        optimizer.step()
    return torch.equal(before, mine(model)), optimizer.exchange.stats.skipped


def scaled(mesh: DeviceMesh, order: str) -> tuple[bool, float, int]:
    """Trained with a scaler, of whose gradients a shard of rank 0 alone overflows in the last step.

    Returns:
        whether it ends where a training without one does that lacks that step, the scale, and how many were skipped.
    """
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = sharded(mesh)
        optimizer = distributed(model, "AdamW", Compression.topk(**SPARSE), mesh["replicate"])
        for number in range(STEPS + scaler.is_enabled()):
            optimizer.zero_grad()
            scaler.scale(loss(model, dist.get_rank(), number)).backward()
            if number == STEPS and dist.get_rank() == 0:
                local(next(model.parameters()).grad)[0, 0] = torch.inf  # type: ignore[arg-type]
            if order == "synchronized":
                optimizer.synchronize()
            if order != "plain":
                scaler.unscale_(optimizer)
            with optimizer.skip_synchronize() if order == "synchronized" else nullcontext():
                scaler.step(optimizer)
            scaler.update()
        ends.append((mine(model), scaler.get_scale(), optimizer.exchange.stats.skipped))
    return torch.equal(ends[0][0], ends[1][0]), *ends[1][1:]


def resumed(mesh: DeviceMesh) -> bool:
    """Whether a training that was saved in the middle, on every rank its own part, ends where it would have."""
    saved: dict[str, Any] = {}

    def run(steps: range, load: bool) -> Tensor:
        model = sharded(mesh)
        optimizer = distributed(model, "AdamW", Compression.sharded(**SPARSE), mesh["replicate"])
        if load:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            optimizer.load_memory_state_dict(saved["memory"])
        for number in steps:
            if number == 3 and not load:
                saved["model"] = {name: value.clone() for name, value in model.state_dict().items()}
                saved["optimizer"] = copy.deepcopy(optimizer.state_dict())
                saved["memory"] = optimizer.memory_state_dict()
            optimizer.zero_grad()
            loss(model, dist.get_rank(), number).backward()
            optimizer.step()
        return mine(model)

    return torch.equal(run(range(STEPS), False), run(range(3, STEPS), True))


def flushed(mesh: DeviceMesh, folder: str) -> tuple[Tensor, float]:
    """Leaves a checkpoint after a flush; the model, and the largest value that is unsent."""
    model = sharded(mesh)
    optimizer = distributed(model, "AdamW", Compression.sharded(**SPARSE), mesh["replicate"])
    for number in range(STEPS):
        if number == STEPS - 1:
            optimizer.flush()
        optimizer.zero_grad()
        loss(model, dist.get_rank(), number).backward()
        optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return whole(model), float(optimizer.exchange.memory.residual.abs().max())


def looks(mesh: DeviceMesh) -> bool:
    """Whether looking at the model between the passes of a training changes nothing of it."""

    def run(look: bool) -> Tensor:
        model = sharded(mesh)
        optimizer = distributed(model, "AdamW", Compression.sharded(**SPARSE), mesh["replicate"])
        for number in range(STEPS):
            if look:
                with torch.no_grad():
                    seen = loss(model.eval(), dist.get_rank(), 99)
                    model.train()
                plain = net()
                plain.load_state_dict({name: v.full_tensor() for name, v in model.state_dict().items()})
                assert abs(float(seen) - float(loss(plain, dist.get_rank(), 99))) < 1e-6
            optimizer.zero_grad()
            loss(model, dist.get_rank(), number).backward()
            optimizer.step()
        return mine(model)

    return torch.equal(run(False), run(True))


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """What is said of what cannot work."""
    model, compression, replicas = sharded(mesh), Compression.topk(**SPARSE), mesh["replicate"]
    flat_mesh = init_device_mesh("cpu", (SIZE,))
    everywhere = net()
    fully_shard(everywhere, mesh=flat_mesh)
    hybrid = net()
    fully_shard(hybrid, mesh=mesh)
    partly = nn.ModuleList([sharded(mesh), net()])
    cases: dict[str, Callable[[], Any]] = {
        "the same group": lambda: distributed(everywhere, "SGD", compression, flat_mesh),
        "the shards' group": lambda: distributed(model, "SGD", compression, mesh["shard"]),
        "all ranks": lambda: distributed(model, "SGD", compression, dist.group.WORLD),
        "no group": lambda: distributed(model, "SGD", compression, None),
        "replicas summed by FSDP": lambda: distributed(hybrid, "SGD", compression, replicas),
        "some are whole": lambda: distributed(partly, "SGD", compression, replicas),
        "buckets": lambda: distributed(model, "SGD", Compression.sketch(**SPARSE, buckets=3), replicas),
        "StepAhead": lambda: distributed(model, "SGD", compression, replicas, error_feedback=hvd.StepAhead()),
        "broadcast": lambda: hvd.broadcast_parameters(model.state_dict()),
    }
    said = {}
    for name, case in cases.items():
        with pytest.raises(ConfigurationError) as raised:
            case()
        said[name] = str(raised.value)
    return said


def on_4_ranks(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ends: dict[Any, Tensor] = {}
    for name in OPTIMIZERS:
        for compressor, make in COMPRESSORS.items():
            ends[name, compressor] = mine(trained(mesh, name, make())[0])
    moments = Anticipate(second_moments=FactoredMoments(interval=1))
    ends["moments"] = mine(trained(mesh, "AdamW", Compression.topk(**SPARSE), error_feedback=moments)[0])
    return {
        "far": {(name, *clips): far(mesh, name, *clips) for name in OPTIMIZERS for clips in CLIPS},
        "ends": ends,
        "conserved": {name: conserved(mesh, make) for name, make in COMPRESSORS.items()},
        "voided": voided(mesh),
        "scaled": [scaled(mesh, order) for order in ("plain", "unscaled", "synchronized")],
        "resumed": resumed(mesh),
        "looks": looks(mesh),
        "flushed": flushed(mesh, folder),
        "refused": refused(mesh),
    }


CLIPS = ((None, None), (0.05, None), (None, 0.05))
"""The compressor's, and ``clip_grad_norm_`` between exchange and step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def told(folder: str) -> list[dict[str, Any]]:
    return ranks(SIZE, on_4_ranks, folder, launcher="torchrun")


def test_shards_train_as_the_whole_model_does(told: list[dict[str, Any]]) -> None:
    """Sums of shards and of wholes are rounded differently, and Adam divides by the roots of small ones."""
    for each in told:
        for (name, *_), distance in each["far"].items():
            assert distance < {"SGD": 1e-6, "AdamW": 1e-4}[name]


def test_replicas_of_a_shard_stay_the_same(told: list[dict[str, Any]]) -> None:
    for key, end in told[0]["ends"].items():
        assert torch.equal(end, told[2]["ends"][key])
        assert torch.equal(told[1]["ends"][key], told[3]["ends"][key])


def test_nothing_is_lost(told: list[dict[str, Any]]) -> None:
    for each in told:
        for name, (difference, kept) in each["conserved"].items():
            assert difference < 1e-5, name
            assert kept > 0.0


def test_a_step_is_void_for_all_shards(told: list[dict[str, Any]]) -> None:
    assert [each["voided"] for each in told] == [(True, 1)] * SIZE


def test_scalers_find_an_overflow_of_one_shard_on_all_ranks(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["scaled"] == [(True, 512.0, 1)] * 3


def test_a_checkpoint_of_each_ranks_part(told: list[dict[str, Any]]) -> None:
    assert all(each["resumed"] for each in told)


def test_a_checkpoint_after_a_flush_serves_any_number_of_ranks(told: list[dict[str, Any]], folder: str) -> None:
    """Saved of four that shard two models, and loaded by three that have one each."""
    saved, unsent = told[0]["flushed"]
    assert unsent == 0.0

    def body(comm: Communicator) -> tuple[Tensor, Tensor, float]:
        model, inner = restored[comm.rank]
        optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), Compression.sharded(**SPARSE), comm=comm)
        loaded, taken = flat(model), float(inner.state[next(model.parameters())]["step"])
        return loaded, train(optimizer, model, range(STEPS, 2 * STEPS), comm.rank), taken

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is loaded by one process
        restored = [from_checkpoint(folder) for _ in range(3)]
    ends = run_in_process(3, body)
    for loaded, end, taken in ends:
        assert torch.equal(loaded, saved)
        assert torch.equal(end, ends[0][1])
        assert taken == STEPS


def from_checkpoint(folder: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A whole model and its optimizer, in this process."""
    model = net(1)
    optimizer = OPTIMIZERS["AdamW"](model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return model, optimizer


def test_evaluation_between_steps_meets_the_model_and_changes_nothing(told: list[dict[str, Any]]) -> None:
    assert all(each["looks"] for each in told)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "the same group",
            "gradients FSDP sums over the ranks of comm itself, and leaves nothing to compress; shard inside",
        ),
        ("the shards' group", "leaves nothing to compress"),
        ("all ranks", "they hold other shards"),
        ("no group", "of which this process has a part only; shard inside a host"),
        ("replicas summed by FSDP", 'fully_shard(model, mesh=mesh["shard"])'),
        ("some are whole", "'1.0.weight' is none; give each kind an optimizer of its own"),
        ("buckets", "with which buckets above 1 does not work"),
        ("StepAhead", "with which error_feedback=StepAhead does not work"),
        ("broadcast", "is a DTensor"),
    ],
)
def test_refusals_say_what_to_do(told: list[dict[str, Any]], case: str, said: str) -> None:
    for each in told:
        assert said in each["refused"][case]
        assert "\n" not in each["refused"][case]
