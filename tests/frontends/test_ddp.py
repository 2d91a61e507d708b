"""DistributedDataParallel with our hook: what it trains is what `DistributedOptimizer` trains, and nothing is lost.

One launch of two ranks goes through all cases; each test looks at one of them.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torch.nn.parallel.distributed import _MixedPrecision

import hvd_sketch as hvd
from hvd_sketch import Anticipate, Compression, ConfigurationError, SavedMemory
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from tests.support import ddp as scripts
from tests.support import ddp_parity
from tests.support.ddp import AHEAD, PLAIN, RATE, SIZE, STEPS, Balance, balance, local_gradient, sgd, step, wrapped
from tests.support.ranks import launch, python, ranks
from tests.support.training import flat, flat_gradient, loss, net

COMPRESSORS: Mapping[str, Callable[[], Any]] = {
    "topk": lambda: Compression.topk(**PLAIN),
    "sharded": lambda: Compression.sharded(**AHEAD),
    "sketch": lambda: Compression.sketch(**AHEAD),
    "sketch, buckets": lambda: Compression.sketch(**PLAIN, buckets=3),
    "powersgd": lambda: Compression.powersgd(rank=2),
}
WRAPPINGS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "small buckets": {"bucket_cap_mb": 0.004},
    "views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.004},
    "static graph": {"static_graph": True},
    "unused looked for": {"find_unused_parameters": True},
}


def trained(make: Callable[[], Any], **settings: Any) -> Tensor:
    """Six steps with the hook; the parameters."""
    model = wrapped(net(), **settings)
    optimizer = sgd(model, momentum=0.5)
    hvd.ddp.register(model, optimizer, make())
    for number in range(STEPS):
        step(model, optimizer, number)
    return flat(model)


def accumulated() -> Tensor:
    """Two passes a step, the first one inside ``no_sync``."""
    model = wrapped(net())
    optimizer = sgd(model)
    hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    for number in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            with nullcontext() if part else model.no_sync():
                loss(model, dist.get_rank(), 2 * number + part).backward()
        optimizer.step()
    return flat(model)


def anticipating() -> Tensor:
    model = wrapped(net())
    optimizer = hvd.ddp.register(model, sgd(model), COMPRESSORS["sharded"](), error_feedback=Anticipate(0.4))
    for number in range(STEPS):
        step(model, optimizer, number)
    assert optimizer.exchange.stats.steps == STEPS
    assert optimizer.memory_state_dict()["size"] == SIZE
    return flat(model)


class Branches(nn.Module):
    """Two layers, of which a pass may leave the second one out."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = net(1), net(2)

    def forward(self, inputs: Tensor, both: bool = True) -> Tensor:
        result: Tensor = self.always(inputs)
        return result + self.sometimes(inputs) if both else result


def branching(buckets: int, **settings: Any) -> Balance:
    """The second branch is used by all, by rank 0 alone, or by none."""
    torch.manual_seed(dist.get_rank())
    inner = Branches()
    model = wrapped(inner, find_unused_parameters=True, **settings)
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, Compression.sketch(**PLAIN, buckets=buckets))
    start, computed, rank = flat(model), torch.zeros(flat(model).numel()), dist.get_rank()
    for number in range(2 * STEPS):
        both = number % 3 == 0 or (number % 3 == 1 and rank == 0)
        inputs = torch.randn(8, 30)
        before = flat(inner.sometimes)
        computed += local_gradient(inner, inner(inputs, both).square().mean())
        optimizer.zero_grad()
        model(inputs, both).square().mean().backward()
        optimizer.step()
        if number % 3 == 2:
            assert torch.equal(flat(inner.sometimes), before)
    return balance(inner, start, state, computed)


def synchronized_twice(set_to_none: bool) -> Balance:
    """Accumulation without ``no_sync``, and gradients that are cleared in place of a step now and then."""
    inner = net()
    model = wrapped(inner)
    optimizer, rank = sgd(model), dist.get_rank()
    state = hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    start, computed = flat(model), torch.zeros(flat(model).numel())
    for number in range(STEPS):
        optimizer.zero_grad(set_to_none)
        for part in range(2):
            value = loss(inner, rank, 2 * number + part)
            if number % 3 != 1:
                computed += local_gradient(inner, value)
            loss(model, rank, 2 * number + part).backward()
        if number % 3 != 1:
            optimizer.step()
    return balance(inner, start, state, computed)


def cleared() -> bool:
    """What is cleared without a step leaves the memory as it was."""
    model = wrapped(net())
    optimizer = sgd(model)
    state = hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    step(model, optimizer, 0)
    before = state.memory_state_dict()
    optimizer.zero_grad()
    loss(model, dist.get_rank(), 1).backward()
    changed = not torch.equal(before["memory"]["residual"], state.exchange.memory.residual)
    optimizer.zero_grad()
    after = state.memory_state_dict()
    same = torch.equal(before["memory"]["residual"], after["memory"]["residual"])
    return changed and same and before["step"] == after["step"] == 1


class Uneven(NamedTuple):
    balance: Balance
    steps: int
    joined: Tensor
    end: Tensor


def uneven(longest: int = 1, **settings: Any) -> Uneven:
    """One rank has half of the batches of the other, and as many again after that."""
    inner = net()
    model = wrapped(inner)
    optimizer, rank = sgd(model, **settings), dist.get_rank()
    state = hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    start, computed = flat(model), torch.zeros(flat(model).numel())
    with model.join():
        for number in range(STEPS * (1 + (rank == longest)) // 2):
            computed += local_gradient(inner, loss(inner, rank, number))
            step(model, optimizer, number)
    joined, steps = flat(model), state.exchange.stats.steps
    for number in range(STEPS, STEPS + 3):
        computed += local_gradient(inner, loss(inner, rank, number))
        step(model, optimizer, number)
    return Uneven(balance(inner, start, state, computed), steps, joined, flat(model))


def uneven_in_turn() -> list[Tensor]:
    """Two models inside one ``Join``, the backward pass of each before the forward pass of the next."""
    models = [wrapped(net(seed)) for seed in range(2)]
    optimizers, rank = [sgd(model, momentum=0.5) for model in models], dist.get_rank()
    for model, optimizer in zip(models, optimizers, strict=True):
        hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    with Join([*models]):
        for number in range(STEPS * (1 + rank) // 2):
            for model, optimizer in zip(models, optimizers, strict=True):
                step(model, optimizer, number)
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, STEPS)
    return [flat(model) for model in models]


def taken_over() -> tuple[bool, float]:
    """Whether what is unsent stays when what is common comes from another rank, as after ``hvd.join()``; and it."""
    model = wrapped(net())
    optimizer = sgd(model, momentum=0.5)
    state = hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    for number in range(2):
        step(model, optimizer, number)
    before = state.exchange.memory.residual.clone()
    state.take_over(state.shared_state())
    return torch.equal(state.exchange.memory.residual, before), float(before.norm())


def void(*, scales: bool = False, closure: bool = False) -> tuple[bool, bool, float, int]:
    """Rank 1's gradient of the third step is not a number, with momentum and weight decay at work."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scales else None
    model = wrapped(net())
    optimizer = sgd(model, momentum=0.9, weight_decay=0.1)
    state = hvd.ddp.register(model, optimizer, COMPRESSORS["sketch"]())
    rank, same = dist.get_rank(), False
    for number in range(4):
        before = flat(model)
        value = torch.nan if (rank, number) == (1, 2) else 1.0

        def evaluate(number: int = number, value: float = value) -> float:
            optimizer.zero_grad()
            result = loss(model, rank, number) * value
            (scaler.scale(result) if scaler else result).backward()
            return float(result)

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        same = same or (number == 2 and torch.equal(flat(model), before))
    end = flat(model)
    return same, bool(end.isfinite().all()), scaler.get_scale() if scaler else 0.0, state.exchange.stats.skipped


def train_scaled(model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler | None, *, clips: bool) -> None:
    """Steps with a scaler, which unscales before clipping, or plain ones."""
    for number in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, dist.get_rank(), number)
        (scaler.scale(value) if scaler else value).backward()
        if scaler is None:
            optimizer.step()
            continue
        if clips:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        scaler.step(optimizer)
        scaler.update()


def scaled() -> tuple[Tensor, Tensor]:
    """With a scaler and without: powers of two round nothing."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = wrapped(net())
        optimizer = sgd(model)
        hvd.ddp.register(model, optimizer, COMPRESSORS["topk"](), grad_scaler=scaler)
        train_scaled(model, optimizer, scaler, clips=True)
        ends.append(flat(model))
    return ends[0], ends[1]


def scale_found(fused: bool) -> tuple[Tensor, Tensor]:
    """Of a scaler that nobody tells of, and one that a fused step unscales for: what is kept with it and without."""
    kept = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = wrapped(net())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
        state = hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
        if scaler is None:
            state.flush()  # as the first step does of which the scale is not known yet
        train_scaled(model, optimizer, scaler, clips=False)
        kept.append(state.exchange.memory.residual)
    return kept[0], kept[1]


def autocast() -> Tensor:
    model = wrapped(net())
    optimizer = sgd(model)
    hvd.ddp.register(model, optimizer, COMPRESSORS["sharded"]())
    for number in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, dist.get_rank(), number)
        value.backward()
        optimizer.step()
    return flat(model)


def compiled() -> Tensor:
    model: Any = torch.compile(wrapped(net()), backend="aot_eager")
    optimizer = sgd(model, momentum=0.5)
    hvd.ddp.register(model, optimizer, COMPRESSORS["sharded"]())
    for number in range(STEPS):
        step(model, optimizer, number)
    return flat(model)


def plain_hook() -> tuple[Tensor, int, float]:
    model = wrapped(net())
    optimizer = sgd(model)
    state = hvd.ddp.State(COMPRESSORS["topk"](), optimizer)
    model.register_comm_hook(state, hvd.ddp.hook)
    for number in range(STEPS):
        step(model, optimizer, number)
    assert state.exchange.stats.bytes_sent > 0
    averaged = flat_gradient(model)
    state.flush()
    step(model, optimizer, STEPS)
    return averaged, state.exchange.stats.steps, float(state.exchange.memory.residual.abs().max())


def resumed(folder: str) -> tuple[bool, Tensor]:
    """A run saved by torch.distributed.checkpoint goes on as if it had never been; what it saves after a flush."""
    model = wrapped(net())
    optimizer = sgd(model, momentum=0.5)
    state = hvd.ddp.register(model, optimizer, COMPRESSORS["sharded"]())
    for number in range(STEPS):
        if number == 3:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            entries = {"model": model_state, "optimizer": optimizer_state, "memory": SavedMemory(state)}
            save(entries, checkpoint_id=folder)
        step(model, optimizer, number)
    other = wrapped(net(5))
    second = sgd(other, momentum=0.5)
    state = hvd.ddp.register(other, second, COMPRESSORS["sharded"]())
    model_state, optimizer_state = get_state_dict(other, second)
    entries = {"model": model_state, "optimizer": optimizer_state}
    load(entries, checkpoint_id=folder)
    set_state_dict(other, second, model_state_dict=model_state, optim_state_dict=optimizer_state)
    load({"memory": SavedMemory(state)}, checkpoint_id=folder)
    for number in range(3, STEPS):
        step(other, second, number)
    same = torch.equal(flat(model), flat(other))
    state.flush()
    step(other, second, STEPS)
    save({"model": other.module.state_dict(), "optimizer": second.state_dict()}, checkpoint_id=f"{folder}/flushed")
    return same, flat(other)


def refused(body: Callable[[], Any]) -> str:
    with pytest.raises((ConfigurationError, hvd.RankMismatchError, RuntimeError)) as told:
        body()
    return f"{type(told.value).__name__}: {told.value}"


def mismatched() -> None:
    model = wrapped(net())
    optimizer = sgd(model)
    hvd.ddp.register(model, optimizer, Compression.topk(**{**PLAIN, "ratio": 8.0 + dist.get_rank()}))
    step(model, optimizer, 0)


def scheduled_by_batch() -> None:
    """Inside ``join()``, where rank 0 has half of the batches, and after it."""
    model = wrapped(net())
    optimizer = sgd(model)
    hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with model.join():
        for number in range(STEPS // (2 - dist.get_rank())):
            step(model, optimizer, number)
            scheduler.step()
    step(model, optimizer, STEPS)


def unknown() -> None:
    model = wrapped(net())
    optimizer = torch.optim.SGD(list(model.parameters())[:2], RATE)
    model.register_comm_hook(hvd.ddp.State(COMPRESSORS["topk"](), optimizer), hvd.ddp.hook)
    step(model, optimizer, 0)


def sparse() -> None:
    model = wrapped(nn.Embedding(50, 20, sparse=True))
    optimizer = sgd(model)
    hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    model(torch.arange(5)).square().mean().backward()


def unfrozen(attach: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> None:
    """On rank 1, a layer that the optimizer may not even hold begins to train."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), RATE)
    whole = wrapped(model)
    attach(whole, optimizer)
    step(whole, optimizer, 0)
    model[0].requires_grad_(dist.get_rank() == 1)
    step(whole, optimizer, 1)


def alone() -> str:
    """Under horovodrun, where no framework wraps the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOROVOD_SIZE", "2")
        patch.setattr(dist, "is_initialized", lambda: False)
        return refused(lambda: hvd.ddp.register(net(), sgd(net()), COMPRESSORS["topk"]()))


def alone_in_its_group() -> str:
    """Under horovodrun, where a script makes a process group of each process."""
    model = wrapped(net())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOROVOD_SIZE", "2")
        patch.setattr(dist, "get_world_size", lambda group=None: 1)
        return refused(lambda: hvd.ddp.register(model, sgd(model), COMPRESSORS["topk"]()))


def registered_twice() -> None:
    model = wrapped(net())
    for _ in range(2):
        hvd.ddp.register(model, sgd(model), COMPRESSORS["topk"]())


def hooked(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """As `register`, with the plain hook."""
    optimizer = optimizer or sgd(model)
    model.register_comm_hook(hvd.ddp.State(COMPRESSORS["topk"](), optimizer), hvd.ddp.hook)  # type: ignore[operator]


def registered(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    hvd.ddp.register(model, optimizer or sgd(model), COMPRESSORS["topk"]())


def steps_in_backward() -> nn.Module:
    inner = net()
    _apply_optimizer_in_backward(torch.optim.SGD, inner.parameters(), {"lr": RATE})
    return wrapped(inner)


def mixed_by_ddp() -> nn.Module:
    return wrapped(net(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))


def reduced_by_python() -> nn.Module:
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        return wrapped(net())


UNFIT = {"steps in backward": steps_in_backward, "mixed by ddp": mixed_by_ddp, "reduced by python": reduced_by_python}


def sharing() -> None:
    """Two models, the second of which has the first one's layer."""
    inner = net(), net(1)
    inner[1][0] = inner[0][0]
    models = [wrapped(each) for each in inner]
    optimizer = torch.optim.SGD(dict.fromkeys(p for model in models for p in model.parameters()), RATE)
    for model in models:
        hvd.ddp.register(model, optimizer, COMPRESSORS["topk"]())
    loss(models[1], 0, 0).backward()
    loss(models[0], 0, 0).backward()


def errors() -> dict[str, str]:
    model = wrapped(net())
    none: Any = Compression.none
    insisting = Compression.topk(**{**PLAIN, "anticipate": True})
    return {
        "ranks differ": refused(mismatched),
        "scheduled by batch": refused(scheduled_by_batch),
        "a parameter that State does not know": refused(unknown),
        "sparse": refused(sparse),
        "unfrozen": refused(partial(unfrozen, registered)),
        "unfrozen, plain hook": refused(partial(unfrozen, hooked)),
        "alone": alone(),
        "alone in its group": alone_in_its_group(),
        "twice": refused(registered_twice),
        **{what: refused(partial(registered, make())) for what, make in UNFIT.items()},
        **{f"{what}, plain hook": refused(partial(hooked, make())) for what, make in UNFIT.items()},
        "sharing": refused(sharing),
        "of another model": refused(lambda: hvd.ddp.register(model, sgd(net()), COMPRESSORS["topk"]())),
        "of a part": refused(lambda: hvd.ddp.register(model, sgd(model.module[0]), insisting)),
        "not wrapped": refused(lambda: hvd.ddp.register(net(), sgd(model), COMPRESSORS["topk"]())),
        "of the wrapped": refused(lambda: hvd.ddp.register(model.module, sgd(model), COMPRESSORS["topk"]())),
        "no compressor": refused(lambda: hvd.ddp.register(model, sgd(model), none)),
        "mixed by hosts": refused(lambda: hvd.ddp.State(Compression.mixed(ratio=8.0), sgd(model), hierarchical=True)),
        "no groups": refused(lambda: hvd.ddp.State(COMPRESSORS["topk"](), sgd(model), hierarchical=0)),
        "lbfgs": refused(lambda: hvd.ddp.State(COMPRESSORS["topk"](), torch.optim.LBFGS(model.parameters()))),
        "foreign": refused(
            lambda: hvd.ddp.register(
                model,
                torch.optim.SGD(list(model.parameters())[:2], RATE),
                COMPRESSORS["topk"](),
                error_feedback=Anticipate(),
            )
        ),
    }


def on_a_rank(folder: str) -> dict[str, Any]:
    """All cases, without Horovod and mpi4py."""
    sys.modules["horovod"] = sys.modules["mpi4py"] = None  # type: ignore[assignment]
    hvd.init()
    warnings.simplefilter("ignore")
    return {
        **{f"trained, {name}": trained(make) for name, make in COMPRESSORS.items()},
        **{f"wrapped, {name}": trained(COMPRESSORS["sharded"], **kw) for name, kw in WRAPPINGS.items()},
        "buckets in small buckets": trained(COMPRESSORS["sketch, buckets"], bucket_cap_mb=0.004),
        "accumulated": accumulated(),
        "anticipating": anticipating(),
        "balances": [
            branching(1),
            branching(3, bucket_cap_mb=0.004, gradient_as_bucket_view=True),
            synchronized_twice(True),
            synchronized_twice(False),
        ],
        "cleared": cleared(),
        "uneven": [uneven(), uneven(0), uneven(momentum=0.5), uneven(0, momentum=0.5)],
        "uneven in turn": uneven_in_turn(),
        "taken over": taken_over(),
        "void": [void(), void(closure=True)],
        "void, scaled": void(scales=True),
        "scaled": scaled(),
        "scale found": [scale_found(fused) for fused in (False, True)],
        "autocast": autocast(),
        "compiled": compiled(),
        "plain hook": plain_hook(),
        "resumed": resumed(folder),
        "scripts": scripts.seen(),
        "parity": {kind: ddp_parity.ends(kind) for kind in ddp_parity.KINDS},
        "errors": errors(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the ranks' checkpoints."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return ranks(SIZE, on_a_rank, str(folder), launcher="torchrun", timeout=240)


def expected(compressor: str, passes: int = 1, momentum: float = 0.0, **feedback: Any) -> Tensor:
    """What `DistributedOptimizer` trains, on simulated ranks."""

    def body(comm: Communicator) -> Tensor:
        model = net()
        optimizer: Any = hvd.DistributedOptimizer(
            sgd(model, momentum=momentum),
            model.named_parameters(),
            COMPRESSORS[compressor](),
            comm=comm,
            **feedback,
        )
        for number in range(STEPS):
            optimizer.zero_grad()
            for part in range(passes):
                loss(model, comm.rank, passes * number + part).backward()
            optimizer.step()
        return flat(model)

    end, other = run_in_process(SIZE, body)
    assert torch.equal(end, other)
    return end


@pytest.mark.parametrize("name", COMPRESSORS)
def test_it_trains_what_the_optimizer_trains(seen: list[dict[str, Any]], name: str) -> None:
    for one in seen:
        assert torch.equal(one[f"trained, {name}"], expected(name, momentum=0.5))


@pytest.mark.parametrize("name", WRAPPINGS)
def test_however_the_model_is_wrapped(seen: list[dict[str, Any]], name: str) -> None:
    for one in seen:
        assert torch.equal(one[f"wrapped, {name}"], seen[0]["trained, sharded"])
        assert torch.equal(one["buckets in small buckets"], seen[0]["trained, sketch, buckets"])
        assert torch.equal(one["compiled"], seen[0]["trained, sharded"])


def test_passes_that_accumulate_and_steps_ahead_are_those_of_the_optimizer(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert torch.equal(one["accumulated"], expected("topk", passes=2))
        assert torch.equal(one["anticipating"], expected("sharded", error_feedback=Anticipate(0.4)))


def test_what_was_sent_and_what_is_kept_is_what_was_computed(seen: list[dict[str, Any]]) -> None:
    """Unused parameters, accumulation without ``no_sync``, gradients cleared in between, and ranks without data.

    Several optimizers of a model, one that takes another's place, gradients taken around the model, and another
    model's scaler.
    """
    for one in seen:
        joined = [each.balance for each in one["uneven"][:2]]
        for difference, computed, kept in (*one["balances"], *joined, *one["scripts"]["balances"]):
            assert difference < 1e-5 * computed
            assert kept > 0.1 * computed


@pytest.mark.parametrize("kind", ddp_parity.KINDS)
def test_everything_sent_is_what_ddp_averages(seen: list[dict[str, Any]], kind: str) -> None:
    """To the bit, but for float64, which is sent as float32; what is compressed is alike on all ranks."""
    for one in seen:
        plain, everything, some = one["parity"][kind]
        if kind == "several dtypes":
            torch.testing.assert_close(everything, plain)
        else:
            assert torch.equal(everything, plain)
        assert torch.equal(some, seen[0]["parity"][kind][2])
        assert not torch.equal(some, plain)


def test_optimizers_around_others_and_in_their_place(seen: list[dict[str, Any]]) -> None:
    """And a wrapper that is left in evaluation mode, or has another one's place."""
    for one in seen:
        assert torch.equal(one["scripts"]["another"], seen[0]["scripts"]["another"])
        for end in one["scripts"]["around"]:
            assert torch.equal(end, seen[0]["trained, sharded"])


def test_memories_of_a_script_that_saves_loads_and_copies_where_it_likes(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        for what, held in one["scripts"]["true"].items():
            assert held is True or set(held) == {True}, what


def test_a_script_that_trains_in_vain_is_told(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        twice, once, locally, without = one["scripts"]["warned"]
        assert "averages the whole gradients before DistributedOptimizer" in twice
        assert once == ""
        assert "stepped with this rank's own gradients, computed inside no_sync()" in locally
        assert "the model has no hook: model.register_comm_hook(state, hvd_sketch.ddp.hook)" in without


def test_values_may_lie_in_memory_as_they_like(seen: list[dict[str, Any]]) -> None:
    """In every order the same is anticipated, but for the rounding of convolutions."""
    for one in seen:
        torch.testing.assert_close(*one["scripts"]["images"], rtol=1e-4, atol=1e-6)


def test_cleared_gradients_leave_no_trace(seen: list[dict[str, Any]]) -> None:
    assert all(one["cleared"] for one in seen)


def test_uneven_data_end_in_one_model(seen: list[dict[str, Any]]) -> None:
    """Also after what they go on with, in which momentum has its part; and of two models, each in its own."""
    for one, other in zip(*(rank["uneven"] for rank in seen), strict=True):
        assert one.steps == other.steps == STEPS
        assert torch.equal(one.joined, other.joined)
        assert torch.equal(one.end, other.end)
    for end, same in zip(*(rank["uneven in turn"] for rank in seen), strict=True):
        assert torch.equal(end, same)


def test_what_is_unsent_stays_when_what_is_common_comes_from_another_rank(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        stays, norm = one["taken over"]
        assert stays
        assert norm > 0


def test_a_bad_gradient_on_one_rank_makes_the_step_void(seen: list[dict[str, Any]]) -> None:
    """With and without a closure; a scaler lowers its scale on all ranks."""
    for one in seen:
        assert one["void"] == [(True, True, 0.0, 1), (True, True, 0.0, 1)]
        assert one["void, scaled"] == (True, True, 32.0, 1)


def test_mixed_precision(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert torch.equal(*one["scaled"])
        for without, scale in one["scale found"]:
            torch.testing.assert_close(scale, without, rtol=1e-5, atol=1e-7)
        assert torch.equal(one["autocast"], seen[0]["autocast"])
        torch.testing.assert_close(one["autocast"], expected("sharded"), rtol=0.1, atol=0.02)


def test_the_plain_hook(seen: list[dict[str, Any]]) -> None:
    """Every rank has the update in its gradients, and a flush sends everything."""
    for one in seen:
        averaged, steps, kept = one["plain hook"]
        assert torch.equal(averaged, seen[0]["plain hook"][0])
        assert (steps, kept) == (STEPS + 1, 0.0)


def test_a_saved_run_continues_as_if_never_saved(seen: list[dict[str, Any]]) -> None:
    assert all(one["resumed"][0] for one in seen)


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # is not there, and one process reads
def test_a_flushed_checkpoint_fits_another_number_of_ranks(seen: list[dict[str, Any]], folder: Path) -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        model = net(9)
        plain = sgd(model, momentum=0.5)
        step_of(comm, model, plain)  # makes the optimizer's state, into which it is read
        entries = {"model": model.state_dict(), "optimizer": plain.state_dict()}
        with reading:
            load(entries, checkpoint_id=folder / "flushed")
        model.load_state_dict(entries["model"])
        plain.load_state_dict(entries["optimizer"])
        start = flat(model)
        step_of(comm, model, plain)
        return start, flat(model)

    def step_of(comm: Communicator, model: nn.Module, plain: torch.optim.Optimizer) -> None:
        named = model.named_parameters()
        optimizer: Any = hvd.DistributedOptimizer(plain, named, COMPRESSORS["sharded"](), comm=comm)
        loss(model, comm.rank, STEPS + 1).backward()
        optimizer.step()

    reading = threading.Lock()
    ends = run_in_process(3, body)
    for start, end in ends:
        assert torch.equal(start, seen[0]["resumed"][1])
        assert torch.equal(end, ends[0][1])
        assert not torch.equal(end, start)


def test_a_rank_that_is_killed_is_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    """By torchrun, told to make a store for each attempt: in the last one's, ranks find the addresses of the dead."""
    command = ("--max-restarts", "1", *python("tests/scripts/restarted_training.py", tmp_path))
    done = launch(SIZE, command, launcher="torchrun", env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    assert done.returncode == 0, done.output
    for rank in range(SIZE):
        start, end = torch.load(tmp_path / f"rank{rank}.end")
        assert start == 3
        assert torch.equal(end, expected("topk", momentum=0.5))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("ranks differ", "RankMismatchError: .*rank 0 has 'ratio=8.0,', rank 1 has 'ratio=9.0,'"),
        (
            "scheduled by batch",
            "group0.lr=.*missed inside join\\(\\): rank 0 has '3', rank 1 has '0'.*step it by epoch",
        ),
        ("a parameter that State does not know", "give State named_parameters=model.named_parameters()"),
        ("sparse", "rank 1: parameter 'weight' has a sparse gradient; make its embedding with sparse=False"),
        (
            "unfrozen",
            "rank 1: parameter '0.weight' was unfrozen after.*wrap model.module in DistributedDataParallel again",
        ),
        (
            "unfrozen, plain hook",
            "rank 1: parameter '0.weight' was unfrozen after the model was wrapped and registered",
        ),
        ("not wrapped", "needs a torch.nn.parallel.DistributedDataParallel model, got Sequential"),
        ("of the wrapped", "got Sequential.*This model is wrapped already: give what wraps it"),
        ("alone", "HOROVOD_SIZE of horovodrun has started 2 processes.*start with torchrun"),
        ("alone in its group", "at least 2 processes were started together \\(HOROVOD_SIZE of horovodrun=2\\)"),
        ("twice", "has a communication hook already, 'hook', and can have one only: go on with what register has"),
        ("steps in backward", "an optimizer that steps inside of backward.*step after backward"),
        ("mixed by ddp", "mixed_precision=.*use torch.autocast"),
        ("reduced by python", "optimize_ddp='python_reducer'.*leave that setting away"),
        ("steps in backward, plain hook", "an optimizer that steps inside of backward.*step after backward"),
        ("mixed by ddp, plain hook", "mixed_precision=.*use torch.autocast"),
        ("reduced by python, plain hook", "optimize_ddp='python_reducer'.*leave that setting away"),
        ("sharing", "parameters in common with one that was registered after it.*one module that holds both models"),
        ("of another model", "the optimizer holds none of the model's parameters; give the one that steps them"),
        ("of a part", "anticipate=True needs one optimizer of all parameters, and this one does not hold '2.weight'"),
        ("no compressor", "PyTorch's own fp16_compress_hook"),
        ("mixed by hosts", "hierarchical=True divides a compressor's exchange.*does not work with Mixed"),
        ("no groups", "hierarchical must be True, False, None or a number of ranks, got 0"),
        ("lbfgs", "use an optimizer that steps once per gradient"),
        ("foreign", "which does not hold '2.weight'"),
    ],
)
def test_what_cannot_work_is_refused_alike(seen: list[dict[str, Any]], what: str, told: str) -> None:
    assert re.search(told, seen[0]["errors"][what], re.DOTALL)
    assert seen[0]["errors"][what] == seen[1]["errors"][what]
