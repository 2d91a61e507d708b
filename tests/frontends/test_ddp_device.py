"""DistributedDataParallel and process groups with parameters on a GPU.

One rank over NCCL, which refuses two on one GPU, and two over Gloo. Each of the two launches goes through all its
cases, and a test looks at one of them. ``TEST_DEVICE=cpu`` runs the same on the processor, over Gloo alone.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import hvd_sketch as hvd
from hvd_sketch import Anticipate, Compression
from hvd_sketch.comm import as_communicator, default_communicator
from hvd_sketch.comm.in_process import InProcessGroup
from hvd_sketch.error_feedback.default import Default
from hvd_sketch.exchange.drift import PERIOD
from hvd_sketch.frontends.collectives import barrier
from tests.comm import test_backends
from tests.support import on_device
from tests.support.compressors import TOPK
from tests.support.on_device import (
    EVERY,
    FORGETFUL,
    HOOK,
    OPTIMIZER,
    RATE,
    ROUNDED,
    STEPS,
    End,
    Place,
    end_of,
    gradients_of,
)
from tests.support.ranks import ranks
from tests.support.training import flat, loss, net

DEVICE = os.environ.get("TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
LIMIT = 60  # seconds that a rank waits for another one
AHEAD: dict[str, Any] = {"ratio": 8.0, "warmup_steps": 0, "dense_below": 100, "clip_norm": None}

pytestmark = pytest.mark.skipif(not DEVICE, reason="needs a GPU, or TEST_DEVICE=cpu")


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, **settings)


def wrapped(device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(net().to(device))


def collectives(device: torch.device) -> str:
    """Of the device's tensors, over a communicator of its own and over the script's group."""
    with device:
        for comm in (default_communicator(), as_communicator(dist.group.WORLD)):
            test_backends.check(comm)
    barrier()
    return "as they are defined"


def of_both(device: torch.device) -> str:
    """A group with a backend for each kind of tensor, as `hvd_sketch.init` makes it under torchrun."""
    comm = as_communicator(dist.new_group(backend=f"cpu:gloo,cuda:{'nccl' if device.type == 'cuda' else 'gloo'}"))
    for where in (torch.device("cpu"), device):
        with where:
            test_backends.check(comm)
    return "as they are defined"


def host_goes_on(device: torch.device) -> bool:
    """Waiting for NCCL holds up the device, which still sleeps here when the host has gone on."""
    comm, tensor = default_communicator(), torch.ones(100, device=device)
    comm.allreduce(tensor, "first")
    if device.type == "cpu":
        return True
    torch.cuda.synchronize()
    torch.cuda._sleep(2**30)
    comm.allreduce(tensor, "behind")
    reached = torch.cuda.current_stream().record_event()
    before = not reached.query()
    reached.synchronize()
    return before and torch.equal(tensor, torch.full_like(tensor, float(comm.size**2)))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, momentum=0.5)


def trained(
    device: torch.device,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    ratio: float = 0.0,
    *,
    compiled: bool = False,
) -> Tensor:
    """The parameters after a few steps of plain averages, or at a ratio."""
    model: Any = wrapped(device)
    optimizer = make(model)
    if ratio:
        hvd.ddp.register(model, optimizer, Compression.topk(**{**AHEAD, "ratio": ratio, "anticipate": False}))
    called: Any = torch.compile(model, backend="aot_eager") if compiled else model
    for at in range(STEPS):
        optimizer.zero_grad()
        loss(called, dist.get_rank(), at).backward()
        optimizer.step()
    return flat(model)


def anticipating(device: torch.device, feedback: Any, hierarchical: bool | None = None) -> Tensor:
    """By the hook, or by the optimizer that takes its place."""
    model = wrapped(device)
    plain = adamw(model)
    made: Any = hvd.ddp.register(
        model, plain, Compression.sharded(**AHEAD), error_feedback=feedback, hierarchical=hierarchical
    )
    optimizer = made if isinstance(feedback, Anticipate) else plain
    for at in range(2 * STEPS):
        optimizer.zero_grad()
        loss(model, dist.get_rank(), at).backward()
        optimizer.step()
    return flat(model)


def mixed_precision(
    device: torch.device, dtype: torch.dtype, *, fused: bool = False
) -> tuple[list[float], Tensor, bool, int, float]:
    """Losses, parameters, whether the memory is finite, void steps, and the scale at the end."""
    model = wrapped(device)
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, enabled=dtype == torch.float16)
    state = hvd.ddp.register(model, optimizer, Compression.sharded(**AHEAD))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            value = loss(model, dist.get_rank(), 0)
        scaler.scale(value).backward()
        if not fused:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(value))
    finite = bool(state.exchange.memory.residual.isfinite().all())
    return losses, flat(model), finite, state.exchange.stats.skipped, float(scaler.get_scale())


def uneven(device: torch.device) -> End:
    """Rank 0 has half of the batches of rank 1."""
    place = Place(device, dist.get_rank())
    model, optimizer, state = on_device.hooked(place, TOPK)
    with model.join():
        on_device.train(model, optimizer, gradients_of(place.rank)[: STEPS * (1 + place.rank) // 2])
    return end_of(model, state.exchange)


def drifting(device: torch.device) -> tuple[int, str]:
    """The step in which a rank is told that one parameter of rank 1 differs, and what."""
    model = net().to(device)
    optimizer: Any = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.05), model.named_parameters(), Compression.topk(**AHEAD)
    )
    for at in range(PERIOD + 6):
        if (at, dist.get_rank()) == (4, 1):
            with torch.no_grad():
                model.get_parameter("2.weight")[7, 7] += 1e-6
        optimizer.zero_grad()
        loss(model, dist.get_rank(), at).backward()
        try:
            optimizer.step()
        except hvd.RankMismatchError as error:
            return at, str(error)
    return -1, "not told"


SCRIPTS: dict[str, Callable[[torch.device], Any]] = {
    "collectives": collectives,
    "plain": lambda device: (trained(device, adamw), trained(device, adamw, ratio=1.0)),
    "compiled": lambda device: (trained(device, sgd, ratio=8.0), trained(device, sgd, ratio=8.0, compiled=True)),
    "anticipating": lambda device: anticipating(device, Default.OF_COMPRESSION),
    "anticipating, optimizer": lambda device: anticipating(device, Anticipate(0.4)),
    "bfloat16": lambda device: mixed_precision(device, torch.bfloat16),
    "float16": lambda device: mixed_precision(device, torch.float16),
    "float16, fused": lambda device: mixed_precision(device, torch.float16, fused=True),
}
OF_ONE: dict[str, Callable[[torch.device], Any]] = {**SCRIPTS, "of both": of_both, "host goes on": host_goes_on}
OF_TWO: dict[str, Callable[[torch.device], Any]] = {
    **SCRIPTS,
    "anticipating, host": lambda device: anticipating(device, Default.OF_COMPRESSION, hierarchical=True),
    "anticipating, optimizer of a host": lambda device: anticipating(device, Anticipate(0.4), hierarchical=True),
    "uneven": uneven,
    "drifting": drifting,
}


class Failed(str):
    """The traceback of a case that failed, so that others can go on."""


def attempted(case: Callable[..., Any], place: Any) -> Any:
    try:
        return tree_map_only(Tensor, Tensor.cpu, case(place))
    except Exception:
        return Failed(traceback.format_exc())


def on_a_rank(backend: str, name: str) -> dict[str, Any]:
    """All cases of a backend."""
    warnings.simplefilter("ignore")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, timeout=timedelta(seconds=LIMIT))
    alone = dist.get_world_size() == 1
    place = Place(device, dist.get_rank())
    return {
        **{name: attempted(script, device) for name, script in (OF_ONE if alone else OF_TWO).items()},
        **{name: attempted(case, place) for name, case in (HOOK if alone else EVERY).items()},
    }


def launched(count: int, backend: str) -> list[dict[str, Any]]:
    return ranks(
        count,
        on_a_rank,
        backend if DEVICE == "cuda" else "gloo",
        DEVICE,
        launcher="torchrun",
        env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},  # matrix products have the same bits in every run
        timeout=280,
    )


@pytest.fixture(scope="module")
def one() -> list[dict[str, Any]]:
    return launched(1, "nccl")


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return launched(2, "gloo")


def of_all(seen: list[dict[str, Any]], name: str) -> list[Any]:
    """What came of a case on every rank."""
    values = [each[name] for each in seen]
    failed = [f"rank {rank}:\n{value}" for rank, value in enumerate(values) if isinstance(value, Failed)]
    assert not failed, "\n".join(failed)
    return values


def on_processor(name: str, size: int) -> list[End]:
    cpu = torch.device("cpu")
    group = InProcessGroup(size, timeout=LIMIT, hosts=[0] * size)
    return group.run(lambda comm: EVERY[name](Place(cpu, comm.rank, comm)))


def check_end(ends: list[End], expected: list[End], *, exact: bool) -> None:
    """The bits and bytes of the processor; where sums of a product may have another order, those of all ranks."""
    for end, other in zip(ends, expected, strict=True):
        assert torch.equal(end.parameters, ends[0].parameters)
        assert bool(end.parameters.isfinite().all())
        assert end.steps == other.steps
        if exact:
            assert torch.equal(end.parameters, other.parameters)
            assert torch.equal(end.kept.view(torch.int32), other.kept.view(torch.int32))
            assert end.bytes_sent == other.bytes_sent


def check_balance(ends: list[End], computed: Tensor) -> None:
    """Of shape (ranks, steps, total): what was applied and what is kept is what was computed, to rounding."""
    kept = torch.stack([end.kept for end in ends]).double().mean(0)
    total, applied = computed.double().sum((0, 1)) / len(ends), (1.0 - ends[0].parameters.double()) / RATE
    assert float((total - applied - kept).norm()) <= 1e-6 * float(total.norm())


def check_case(seen: list[dict[str, Any]], name: str) -> None:
    ends = of_all(seen, name)
    check_end(ends, on_processor(name, len(seen)), exact=name not in ROUNDED)
    if name not in FORGETFUL:
        check_balance(ends, torch.stack([gradients_of(rank)[:, 0] for rank in range(len(seen))]))


@pytest.mark.parametrize("name", HOOK)
def test_the_hook_over_nccl_has_the_bits_of_the_processor(one: list[dict[str, Any]], name: str) -> None:
    check_case(one, name)


@pytest.mark.parametrize("name", HOOK)
def test_the_hook_on_two_ranks_has_the_bits_of_the_processor(two: list[dict[str, Any]], name: str) -> None:
    check_case(two, name)


@pytest.mark.parametrize("name", OPTIMIZER)
def test_the_optimizer_on_two_ranks_has_the_bits_of_the_processor(two: list[dict[str, Any]], name: str) -> None:
    check_case(two, name)


@pytest.fixture(params=["one", "two"])
def seen(request: pytest.FixtureRequest) -> Any:
    """Of one rank over NCCL, and of two over Gloo."""
    return request.getfixturevalue(request.param)


def test_collectives_of_the_devices_tensors(seen: list[dict[str, Any]]) -> None:
    assert set(of_all(seen, "collectives")) == {"as they are defined"}


def test_collectives_of_a_group_with_both_backends(one: list[dict[str, Any]]) -> None:
    assert of_all(one, "of both") == ["as they are defined"]


def test_waiting_for_nccl_does_not_hold_up_the_host(one: list[dict[str, Any]]) -> None:
    assert of_all(one, "host goes on") == [True]


def test_everything_sent_is_what_ddp_averages(seen: list[dict[str, Any]]) -> None:
    for plain, everything in of_all(seen, "plain"):
        assert torch.equal(everything, plain)


def test_a_compiled_model_is_trained_alike(seen: list[dict[str, Any]]) -> None:
    for ours, compiled in of_all(seen, "compiled"):
        torch.testing.assert_close(compiled, ours)


@pytest.mark.parametrize("name", ["anticipating", "anticipating, optimizer"])
def test_anticipated_gradients_train_one_model(seen: list[dict[str, Any]], name: str) -> None:
    check_one_model(of_all(seen, name))


@pytest.mark.parametrize("name", ["anticipating, host", "anticipating, optimizer of a host"])
def test_anticipated_gradients_of_two_ranks_with_one_memory(two: list[dict[str, Any]], name: str) -> None:
    check_one_model(of_all(two, name))


def check_one_model(ends: list[Tensor]) -> None:
    assert all(torch.equal(end, ends[0]) for end in ends)
    assert bool(ends[0].isfinite().all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float16, fused"])
def test_mixed_precision_trains_one_model(seen: list[dict[str, Any]], dtype: str) -> None:
    """A scaler whose scale is too large at first makes the same steps void on all ranks."""
    told = of_all(seen, dtype)
    for losses, end, finite, skipped, scale in told:
        assert losses[-1] < 0.5 * losses[0]
        assert torch.equal(end, told[0][1])
        assert finite
        assert (skipped, scale) == told[0][3:]
        assert (skipped > 0) == (dtype != "bfloat16")


def test_uneven_data_of_two_ranks_end_in_one_model(two: list[dict[str, Any]]) -> None:
    ends = of_all(two, "uneven")
    assert [end.steps for end in ends] == [STEPS, STEPS]
    assert torch.equal(ends[0].parameters, ends[1].parameters)
    computed = torch.stack([gradients_of(rank)[:, 0] for rank in range(2)])
    computed[0, STEPS // 2 :] = 0.0
    check_balance(ends, computed)


def test_a_parameter_of_its_own_is_told_to_two_ranks(two: list[dict[str, Any]]) -> None:
    (step, text), other = of_all(two, "drifting")
    assert (step, text) == other
    assert 4 <= step < 4 + PERIOD
    assert "parameters: rank 0 has '2.weight=" in text
