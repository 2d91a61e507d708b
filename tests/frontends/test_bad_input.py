"""Bad input: an error that names the parameter, the rank where it matters and the remedy, alike on all ranks.

Nothing hangs, and the memory is as before the step.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch as hvd
from hvd_sketch import Compression, ConfigurationError, DistributedOptimizer, RankMismatchError, SingleProcess
from hvd_sketch.memory import Momentum
from tests.support.public import PUBLIC, arguments_for, numbers_of, whole_numbers_of
from tests.support.ranks import ranks
from tests.support.training import COMPRESSED, flat, loss, net, train

SETTINGS: dict[str, Any] = {"ratio": 10.0, "warmup_steps": 0}


def refused(expected: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s){expected}"):
        call()


@pytest.mark.parametrize("make", [Compression.auto, Compression.sketch, Compression.topk, Compression.sharded])
@pytest.mark.parametrize("ratio", [0.5, 0.0, -3.0, float("nan")])
def test_a_ratio_below_one_is_refused(make: Any, ratio: float) -> None:
    refused("ratio must be at least 1, which sends everything; got", lambda: make(ratio=ratio))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cols": 5}, "both cols and k"),
        ({"k": 5}, "both cols and k"),
        ({"cols": 0, "k": 5}, "cols must be at least 1"),
        ({"cols": 5, "k": 0}, "k must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"table_share": 1.0}, "table_share must be between 0 and 1"),
        ({"in_turn": 1.0}, "in_turn must be at least 0 and below 1"),
        ({"oversampling": 0.5}, "oversampling must be at least 1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 or None"),
        ({"clip_norm": float("nan")}, "clip_norm must be above 0 or None"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"exclude": "*.head"}, "exclude must be a tuple"),
        ({"ratio": "40"}, "ratio must be a number, got '40'"),
        ({"ratio": None}, "ratio must be a number, got None"),
        ({"dense_below": "0"}, "dense_below must be a number, got '0'"),
        ({"half": "false"}, "half must be True or False, got 'false'"),
        ({"anticipate": "no"}, "anticipate must be True or False, got 'no'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_when_made(settings: dict[str, Any], expected: str) -> None:
    refused(expected, lambda: Compression.sketch(**settings))


@pytest.mark.parametrize(("make", "name"), [(make, name) for make in PUBLIC for name in numbers_of(make)])
def test_numbers_that_are_text_are_refused(make: Callable[..., Any], name: str) -> None:
    needed = {**arguments_for(make), name: "4"}
    refused(rf"{name}\b.* got '4'", lambda: make(**needed))


@pytest.mark.parametrize(("make", "name"), [(make, name) for make in PUBLIC for name in numbers_of(make)])
def test_numbers_that_are_none_are_refused(make: Callable[..., Any], name: str) -> None:
    """Not a number: no comparison with it holds, so a check by what must not be lets it pass."""
    needed = {**arguments_for(make), name: float("nan")}
    refused(rf"{name}\b.*\bnan\b", lambda: make(**needed))


@pytest.mark.parametrize("value", [2.5, float("inf")])
@pytest.mark.parametrize(("make", "name"), [(make, name) for make in PUBLIC for name in whole_numbers_of(make)])
def test_numbers_that_are_not_whole_are_refused(make: Callable[..., Any], name: str, value: float) -> None:
    """A period of 2.5 steps would never be over."""
    needed = {**arguments_for(make), name: value}
    refused(rf"{name} must be a whole number, got {value}", lambda: make(**needed))


def wrap(model: nn.Module, compression: Any = None, **keywords: Any) -> Any:
    keywords.setdefault("named_parameters", list(model.named_parameters()))
    keywords.setdefault("comm", SingleProcess())
    inner = keywords.pop("inner", torch.optim.SGD(model.parameters(), 0.1))
    return DistributedOptimizer(inner, compression=compression or Compression.sketch(**SETTINGS), **keywords)


def test_more_values_than_parameters_are_refused() -> None:
    compression = Compression.sketch(cols=100, k=COMPRESSED + 1)
    refused(f"k={COMPRESSED + 1} exceeds the {COMPRESSED} compressed parameters", lambda: wrap(net(), compression))
    wrap(net(), Compression.sketch(cols=100, k=COMPRESSED))


def test_an_unreachable_ratio_is_refused_when_the_optimizer_is_wrapped() -> None:
    refused(
        "ratio=60 cannot be reached: 100 of the 4300 parameters.*at most about.*lower dense_below, or exclude fewer",
        lambda: wrap(net(), Compression.sketch(ratio=60.0, dense_below=1024)),
    )


@pytest.mark.parametrize("make", [Compression.topk, Compression.sharded])
def test_a_ratio_unreachable_for_these_ranks_is_refused_in_the_first_step(make: Any) -> None:
    """Not when the warm-up ends."""
    optimizer = wrap(net(), make(ratio=1000.0, dense_below=1024))
    refused("ratio=1000 cannot be reached.*at most about", lambda: optimizer.exchange)


def test_a_model_too_small_for_the_ratio_is_told_so() -> None:
    """Nothing of it is dense, so there is nothing to lower or to exclude."""
    optimizer = wrap(nn.Linear(9, 4), Compression.sharded(ratio=100.0))
    refused(
        "ratio=100 cannot be reached: 40 parameters are too few.*of the 160 bytes.*or train so small a model without",
        lambda: optimizer.exchange,
    )


def test_a_model_without_anything_to_compress_is_refused() -> None:
    refused(
        "nothing to compress: all 40 parameters are 1-D.*dense_below=1024",
        lambda: wrap(nn.Linear(9, 4), Compression.sketch(ratio=10.0, dense_below=1024)),
    )
    refused(
        "nothing to compress",
        lambda: wrap(net(), Compression.sketch(exclude=("*",), **SETTINGS)),
    )


@pytest.mark.parametrize("compression", [Compression.none, Compression.fp16, Compression.sketch(**SETTINGS)])
def test_unfit_parameter_lists_are_refused_with_any_compression(compression: Any) -> None:
    model = net()
    named = list(model.named_parameters())
    for names, expected in (
        ([], "named_parameters lacks 4 parameters"),
        (
            named[:-1],
            r"named_parameters lacks 1 parameters of the optimizer, the first one at \(group, index\) \(0, 3\)",
        ),
        ([("same", p) for _, p in named], "'same' occurs more than once"),
        ([p for _, p in named], "sequence of tuples"),
    ):
        refused(expected, lambda names=names: wrap(model, compression, named_parameters=names))  # type: ignore[misc]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refused("named_parameters is empty", lambda: wrap(model, compression))
    phase = nn.ParameterDict({"phase": torch.zeros(9, 9, dtype=torch.complex64), "w": torch.zeros(90, 90)})
    refused("parameter 'phase' has dtype torch.complex64.*optimizer of its own", lambda: wrap(phase, compression))


def test_other_arguments_that_cannot_work_are_refused() -> None:
    model = net()
    corrected = Compression.sketch(momentum=Momentum(0.9), **SETTINGS)
    for expected, keywords in {
        "op=Adasum cannot be combined with compression: only Average and Sum": {"op": 2},
        "op=Min cannot": {"op": 3},
        "op=sum cannot": {"op": "sum"},
        "backward_passes_per_step must be at least 1": {"backward_passes_per_step": 0},
        "gradient_predivide_factor is supported with op=Average only": {
            "gradient_predivide_factor": 2.0,
            "op": hvd.Sum,
        },
        "groups must be a number above 0 or a list of lists.*got -1": {"groups": -1},
        "groups must be a number above 0 or a list of lists.*got 'all'": {"groups": "all"},
        "list of lists of parameters": {"groups": list(model.parameters())},
        "one group only": {"groups": [[model[0].weight], [model[0].weight]]},
        "is no member of hvd_sketch.Compression": {"compression": object()},
        "process_set .* or comm": {"process_set": object()},
        "comm must be an mpi4py communicator": {"comm": 5},
        "momentum is applied before the exchange.*group 0.*without momentum": {
            "compression": corrected,
            "inner": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        },
        "momentum is applied before the exchange.* again": {
            "compression": corrected,
            "inner": torch.optim.Adam(model.parameters()),
        },
        "applied before the exchange .factor 0.9. and again": {
            "compression": corrected,
            "inner": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
            "momentum_correction": True,
        },
        "momentum_correction takes over the momentum of torch.optim.SGD, not of Adam": {
            "inner": torch.optim.Adam(model.parameters()),
            "momentum_correction": True,
        },
        "momentum factor must be between 0 and 1": {"momentum_correction": True},
        "does not know dampening": {
            "inner": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.5),
            "momentum_correction": True,
        },
        "does not know maximize": {
            "inner": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, maximize=True),
            "momentum_correction": True,
        },
    }.items():
        refused(expected, lambda keywords=keywords: wrap(model, **keywords))  # type: ignore[misc]


def test_a_momentum_schedule_cannot_be_taken_over() -> None:
    model = net()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = wrap(model, inner=inner, momentum_correction=True)
    optimizer.param_groups[0]["momentum"] = 0.85
    refused("group 0 now has momentum 0.85.*cycle_momentum=False", lambda: train(optimizer, model, 1))


def test_a_schedule_below_one_is_refused() -> None:
    refused("schedule gave ratio 0.5 in step 0", lambda: wrap(net(), Compression.sketch(schedule=lambda step: 0.5)))


def test_an_even_number_of_rows_is_accepted_with_one_warning() -> None:
    model = net()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        optimizer = wrap(model, Compression.sketch(rows=4, ratio=8.0, warmup_steps=4))
        train(optimizer, model, 8)
    assert [str(warning.message) for warning in told if "rows" in str(warning.message)] == [
        "CountSketch: rows=4 is even; an odd number gives a sharper median for fewer bytes"
    ]
    assert flat(model).isfinite().all()


def frozen(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(False)


def unfrozen(model: nn.Sequential) -> None:
    model[2].bias.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (unfrozen, "rank 0: parameter '2.bias' was unfrozen after .* wrap the plain optimizer again"),
    ],
)
def test_a_parameter_that_changes_its_mind_is_told(change: Callable[[Any], None], expected: str) -> None:
    model = net()
    model[2].bias.requires_grad_(False)
    optimizer = wrap(model)
    train(optimizer, model, 3)
    kept = optimizer.exchange.memory.residual.clone()
    change(model)
    refused(expected, lambda: train(optimizer, model, range(3, 4)))
    assert torch.equal(optimizer.exchange.memory.residual, kept)


class OnRanks:
    """Collects what each misuse tells this rank, and whether it changed anything it should not."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    def expect(self, name: str, optimizer: Any, model: nn.Module, backward: Callable[[], Any]) -> None:
        """One step that must be refused and leave memory and parameters alone."""
        kept, before = optimizer.exchange.memory.residual.clone(), flat(model)
        try:
            optimizer.zero_grad()
            backward()
            optimizer.step()
        except (ConfigurationError, RankMismatchError) as error:
            self.told[name] = f"{type(error).__name__}: {error}"
        assert torch.equal(optimizer.exchange.memory.residual, kept)
        assert torch.equal(flat(model), before)


def differently(first: dict[str, Any], second: dict[str, Any]) -> tuple[nn.Sequential, Any]:
    """A model and its optimizer with the second settings on rank 1."""
    keywords = {**SETTINGS, **(second if hvd.rank() == 1 else first)}
    model = net(keywords.pop("start", 0))
    op, renamed = keywords.pop("op", hvd.Average), keywords.pop("renamed", "")
    named = [(renamed + name, parameter) for name, parameter in model.named_parameters()]
    make, kind = keywords.pop("make", Compression.sketch), keywords.pop("kind", torch.optim.SGD)
    more = {name: keywords.pop(name) for name in ("error_feedback", "resync_every") if name in keywords}
    return model, DistributedOptimizer(kind(model.parameters(), 0.1), named, make(**keywords), op=op, **more)


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ratio": ({"ratio": 10.0}, {"ratio": 12.0}, r"settings: rank 0 has .*ratio=10\.0.* rank 1 has .*ratio=12\.0"),
    "seed": ({"seed": 3}, {"seed": 4}, r"settings: rank 0 has .*seed=3.* rank 1 has .*seed=4"),
    "op": ({"op": 0}, {"op": 1}, r"settings: rank 0 has .*average=True.* rank 1 has .*average=False"),
    "compressor": ({}, {"make": Compression.topk}, r"settings: rank 0 has .*Sketch.* rank 1 has .*TopK"),
    "error_feedback": (
        {"error_feedback": hvd.StepAhead()},
        {"error_feedback": None},
        r"settings: rank 0 has .*StepAhead.* rank 1 has .*error_feedback=None",
    ),
    "schedule": (
        {"schedule": lambda step: 8.0 + step // 100},
        {"schedule": lambda step: 8.0 + step // 1000},
        r"settings: rank 0 has .*ratio_of_step_100=9.* rank 1 has .*ratio_of_step_100=8",
    ),
    "optimizer": ({}, {"kind": torch.optim.RMSprop}, r"settings: rank 0 has .*=SGD.* rank 1 has .*=RMSprop"),
    "resync_every": ({}, {"resync_every": 5}, r"settings: rank 0 has .*resync_every=0.* rank 1 has .*resync_every=5"),
    "values": ({}, {"start": 1}, r"values: rank 0 has .*0\.weight=.* rank 1 has .*0\.weight="),
    "parameters": ({}, {"renamed": "other."}, r"parameters: rank 0 has .*0\.weight\[60x30\].* rank 1 has .*'other\.0"),
}


def mismatched() -> dict[str, str]:
    """The fifteen, item 15."""
    hvd.init()
    judge = OnRanks()
    for name, (first, second, _) in MISMATCHES.items():
        model, optimizer = differently(first, second)
        judge.expect(name, optimizer, model, lambda model=model: loss(model, hvd.rank(), 0).backward())  # type: ignore[misc]
        hvd.broadcast_parameters({"same": torch.zeros(2)}, root_rank=0)
    model, optimizer = differently({}, {})
    state = optimizer.memory_state_dict()
    if hvd.rank() < 2:
        optimizer.load_memory_state_dict({**state, "step": 3 + 4 * hvd.rank()})
    judge.expect("memory", optimizer, model, lambda: loss(model, hvd.rank(), 0).backward())
    return judge.told


def test_ranks_that_differ_are_told_how_on_all_of_them() -> None:
    results = ranks(3, mismatched)
    assert all(told == results[0] for told in results)
    expected = {name: pattern for name, (_, _, pattern) in MISMATCHES.items()}
    expected["memory"] = "step: rank 0 has '3', rank 1 has '7'"
    remedy = "Give every rank.*load a saved memory that fits on.*broadcast_parameters.*the first step"
    for name, pattern in expected.items():
        assert re.search(f"(?s)^RankMismatchError.*{pattern}.*{remedy}", results[0][name]), results[0].get(name)


def troubled() -> tuple[dict[str, str], list[Tensor]]:
    """Trouble on rank 1 alone, step by step, and training that goes on after it."""
    hvd.init()
    judge, ends = OnRanks(), []
    model = nn.ModuleDict({"words": nn.Embedding(300, 20, sparse=True), "net": net()})
    words = model["words"]
    assert isinstance(words, nn.Embedding)
    nn.init.ones_(words.weight)
    words.sparse = False
    model["net"][2].bias.requires_grad_(False)  # type: ignore[index]
    optimizer: Any = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), Compression.sketch(**SETTINGS)
    )

    def backward(step: int) -> None:
        (words(torch.tensor([step, hvd.rank(), 7])).square().mean() + loss(model["net"], hvd.rank(), step)).backward()

    def train_on(first: int) -> None:
        for step in range(first, first + 2):
            optimizer.zero_grad()
            backward(step)
            optimizer.step()
        ends.append(flat(model))

    def switch(on: bool) -> None:
        model["net"][0].weight.requires_grad_(not on)  # type: ignore[index]

    def unfreeze(on: bool) -> None:
        model["net"][2].bias.requires_grad_(on)  # type: ignore[index]

    def make_sparse(on: bool) -> None:
        words.sparse = on

    troubles: dict[str, Callable[[bool], None]] = {"sparse": make_sparse, "frozen": switch, "unfrozen": unfreeze}
    train_on(0)
    for number, (name, trouble) in enumerate(troubles.items(), start=1):
        trouble(hvd.rank() == 1)
        judge.expect(name, optimizer, model, lambda number=number: backward(10 * number))  # type: ignore[misc]
        trouble(False)
        train_on(10 * number)
    return judge.told, ends


def test_trouble_on_one_rank_is_told_on_all_and_training_can_go_on() -> None:
    (told, ends), (other, other_ends) = ranks(2, troubled)
    assert told == other
    for name, pattern in {
        "sparse": "rank 1: parameter 'words.weight' has a sparse gradient; pass sparse_as_dense=True",
        "frozen": "parameter 'net.0.weight' is frozen .* on 1 of the 2 ranks; freeze it on all ranks or on none",
        "unfrozen": "rank 1: parameter 'net.2.bias' was unfrozen after",
    }.items():
        assert re.search(f"^ConfigurationError: hvd_sketch: the step was not taken. {pattern}", told[name]), told
    assert len(ends) == 4
    for end, other_end in zip(ends, other_ends, strict=True):
        assert torch.equal(end, other_end)


def not_a_number() -> list[tuple[bool, bool, float]]:
    """NaN, then infinity, on rank 1 only: are all gradients NaN here, is the memory as before, and what is told."""
    hvd.init()
    seen = []
    for make in (Compression.sketch, Compression.topk):
        for bad in (float("nan"), float("inf")):
            model = net()
            optimizer: Any = DistributedOptimizer(
                torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), make(**SETTINGS)
            )
            train(optimizer, model, 3, hvd.rank())
            kept = optimizer.exchange.memory.residual.clone()
            optimizer.zero_grad()
            (loss(model, hvd.rank(), 3) * (bad if hvd.rank() == 1 else 1.0)).backward()
            optimizer.synchronize()
            everywhere = all(bool(p.grad is not None and p.grad.isnan().all()) for p in model.parameters())
            same = torch.equal(optimizer.exchange.memory.residual, kept)
            optimizer.zero_grad()
            loss(model, hvd.rank(), 4).backward()
            optimizer.step()
            seen.append((everywhere, same, float(flat(model).norm())))
    return seen


def test_a_bad_number_on_one_rank_is_bad_on_all_and_spares_every_memory() -> None:
    """The fifteen, item 6; the caller that skips such a step, as a gradient scaler does, trains on."""
    first, second = ranks(2, not_a_number)
    assert first == second
    assert all(everywhere and same and norm < 100 for everywhere, same, norm in first)
