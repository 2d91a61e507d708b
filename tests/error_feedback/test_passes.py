"""Parameters ahead by themselves: a script's own loop ends where the loop with the block does, to the bit."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hvd_sketch
from hvd_sketch import Anticipate, Compression, StepAhead
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from tests.support import training

SHARDED = Compression.sharded(ratio=10.0, warmup_steps=0, clip_norm=None)
Loss = Callable[[Any], Tensor]
ONE_AT_A_TIME = threading.Lock()
"""PyTorch's tracer and its compiler of scripts have one table for all threads."""

Step = Callable[[nn.Module, Any, Loss], None]
"""One step of a script: the model, its optimizer, and the loss of a model on the step's batch."""


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def batch(rank: int, number: int) -> Loss:
    return lambda model: training.loss(model, rank, number)


def train(script: Step, make: Any = adamw, feedback: Any = None, steps: int = 6, net: Any = training.net) -> Tensor:
    """The model after the last step, on all ranks."""

    def on_rank(comm: Communicator) -> Tensor:
        model = net()
        optimizer = hvd_sketch.DistributedOptimizer(
            make(model), model.named_parameters(), SHARDED, comm=comm, error_feedback=feedback or Anticipate()
        )
        for number in range(steps):
            script(model, optimizer, batch(comm.rank, number))
        return training.flat(model)

    models = run_in_process(2, on_rank)
    assert torch.equal(models[0], models[1])
    return models[0]


def in_a_block(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    with optimizer.step_ahead():
        loss(model).backward()
    optimizer.step()


def unchanged(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("feedback", [Anticipate(), StepAhead()], ids=["anticipate", "step ahead"])
def test_an_unchanged_loop_ends_where_the_loop_with_the_block_does(make: Any, feedback: Any) -> None:
    assert torch.equal(train(unchanged, make, feedback), train(in_a_block, make, feedback))


def looking(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    """Everything that a script does between the passes, each where it meets the model itself."""
    before = training.flat(model)

    def is_synchronous() -> bool:
        return torch.equal(training.flat(model), before)

    seen: list[bool] = []
    watch = model.register_forward_pre_hook(lambda *arguments: seen.append(is_synchronous()))
    optimizer.zero_grad()
    value = loss(model)
    if optimizer.exchange.stats.steps:
        assert not is_synchronous()
    with torch.no_grad():
        loss(model)
    with torch.inference_mode():
        loss(model)
    model.eval()
    loss(model)
    model.train()
    assert seen == [seen[0], True, True, True]
    value.backward()
    assert is_synchronous()
    copy.deepcopy(model)
    torch.save(model.state_dict(), io.BytesIO())
    watch.remove()
    optimizer.step()


def saving(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    before = training.flat(model)
    optimizer.zero_grad()
    value = loss(model)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(torch.cat([tensor.reshape(-1) for tensor in saved.values()]), before)
    value.backward()
    optimizer.memory_state_dict()
    optimizer.state_dict()
    optimizer.step()


def tracing(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    """A picture of the graph, for a log."""
    before = training.flat(model)
    with ONE_AT_A_TIME:
        torch.jit.trace(model, torch.ones(3, 30))
    assert torch.equal(training.flat(model), before)
    unchanged(model, optimizer, loss)


def failing(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    with contextlib.suppress(RuntimeError):
        model(torch.zeros(3, 7))  # a batch of another width
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def retaining(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    value = loss(model)
    value.mul(0.25).backward(retain_graph=True)
    value.mul(0.75).backward()
    optimizer.step()


def retaining_in_a_block(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    with optimizer.step_ahead():
        value = loss(model)
        value.mul(0.25).backward(retain_graph=True)
        value.mul(0.75).backward()
    optimizer.step()


def twice(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    first, second = loss(model), loss(model)
    first.backward()
    second.backward()
    optimizer.step()


def twice_in_a_block(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    with optimizer.step_ahead():
        loss(model).backward()
        loss(model).backward()
    optimizer.step()


def penalized(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    gradients = torch.autograd.grad(loss(model), list(model.parameters()), create_graph=True)
    sum((gradient.square().sum() for gradient in gradients), torch.zeros(())).backward()
    optimizer.step()


def penalized_in_a_block(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    with optimizer.step_ahead():
        gradients = torch.autograd.grad(loss(model), list(model.parameters()), create_graph=True)
        sum((gradient.square().sum() for gradient in gradients), torch.zeros(())).backward()
    optimizer.step()


PAIRS: dict[str, tuple[Step, Step]] = {
    "looks at the model": (looking, in_a_block),
    "saves the model": (saving, in_a_block),
    "traces the model": (tracing, in_a_block),
    "fails in forward": (failing, in_a_block),
    "retains the graph": (retaining, retaining_in_a_block),
    "two forwards": (twice, twice_in_a_block),
    "differentiates twice": (penalized, penalized_in_a_block),
}


@pytest.mark.parametrize(("script", "block"), PAIRS.values(), ids=PAIRS)
def test_whatever_a_script_does_in_between(script: Step, block: Step) -> None:
    assert torch.equal(train(script), train(block))


class Checkpointed(nn.Module):
    """The same net, its activations computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = training.net(), reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(self.inner[:2], inputs.requires_grad_(), use_reentrant=self.reentrant)
        return self.inner[2](hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    ended = train(unchanged, net=lambda: Checkpointed(reentrant))
    torch.testing.assert_close(ended, train(in_a_block), rtol=0, atol=0)


class Function:
    """Calls the net's modules as a script would that has no module around them."""

    def __init__(self, net: Any) -> None:
        self.net, self.parameters = net, net.parameters

    def __call__(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(self.net[:2], inputs.requires_grad_(), use_reentrant=True)
        return self.net[2](hidden)  # type: ignore[no-any-return]


def test_checkpoints_without_a_module_around_them() -> None:
    def bare(model: nn.Module, optimizer: Any, loss: Loss) -> None:
        optimizer.zero_grad()
        loss(Function(model)).backward()
        optimizer.step()

    assert torch.equal(train(bare), train(in_a_block))


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model(whole: bool) -> None:
    def net() -> Any:
        return torch.compile(training.net(), backend="eager", fullgraph=whole)

    assert torch.equal(train(unchanged, net=net), train(in_a_block))


def parametrized() -> nn.Module:
    model = training.net()
    nn.utils.parametrizations.weight_norm(model.get_submodule("0"))
    return model


def regularized(model: nn.Module, loss: Loss) -> Tensor:
    """With a term of a weight that is computed when it is read."""
    value = loss(model)
    weight: Tensor = model.get_submodule("0").weight  # type: ignore[assignment]
    return value + weight.square().mean()


def reading(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    regularized(model, loss).backward()
    optimizer.step()
    before = training.flat(model)
    regularized(model, lambda _: torch.zeros(()))
    assert torch.equal(training.flat(model), before)


def reading_in_a_block(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    with optimizer.step_ahead():
        regularized(model, loss).backward()
    optimizer.step()


def test_a_parametrized_weight_may_be_read_at_any_time() -> None:
    """Between the passes at the model, and between forward and backward ahead."""
    assert torch.equal(train(reading, net=parametrized), train(reading_in_a_block, net=parametrized))


def test_a_graph_of_a_model_in_evaluation_mode_is_not_differentiated_ahead() -> None:
    def mixed(model: nn.Module, optimizer: Any, loss: Loss) -> None:
        model.eval()
        other = loss(model)
        model.train()
        with pytest.raises(RuntimeError, match="evaluation mode"):
            (loss(model) + other).backward()
        optimizer.discard()
        unchanged(model, optimizer, loss)

    train(mixed, steps=3)


def test_a_model_trained_in_evaluation_mode_learns_without_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def evaluating(model: nn.Module, optimizer: Any, loss: Loss) -> None:
        model.eval()
        unchanged(model, optimizer, loss)

    with caplog.at_level(logging.WARNING, "hvd_sketch"):
        train(evaluating)
    assert [record.message for record in caplog.records if "without the step ahead" in record.message][1:] != []


def test_a_scripted_model_learns_without_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody would notice that it is saved in between."""

    def scripted() -> nn.Module:
        with ONE_AT_A_TIME:
            return torch.jit.script(training.net())

    with caplog.at_level(logging.WARNING, "hvd_sketch"):
        train(unchanged, net=scripted)
    assert [record.message for record in caplog.records if "not scripted" in record.message][1:] != []


class Renormed(nn.Module):
    """Its embedding changes its own weight in forward."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.randn(100, 60, generator=torch.Generator().manual_seed(0))
        self.embedding = nn.Embedding(100, 60, max_norm=0.5, _weight=drawn)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(torch.arange(16, device="cpu"))
        return hidden[:, :40]


def test_parameters_that_change_in_forward_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hvd_sketch"):
        train(unchanged, net=Renormed)
    assert len([record for record in caplog.records if "changed between" in record.message]) == 2  # one a rank


def test_a_dropped_optimizer_moves_nothing() -> None:
    def on_rank(comm: Communicator) -> None:
        model = training.net()

        def wrapped(feedback: Anticipate | None) -> Any:
            return hvd_sketch.DistributedOptimizer(
                adamw(model), model.named_parameters(), SHARDED, comm=comm, error_feedback=feedback
            )

        older = wrapped(Anticipate())
        for number in range(3):
            unchanged(model, older, batch(comm.rank, number))
        newer = wrapped(None)
        before = training.flat(model)
        newer.zero_grad()
        training.loss(model, comm.rank, 3)
        assert torch.equal(training.flat(model), before)
        del older

    run_in_process(2, on_rank)
    gc.collect()


def test_a_copy_goes_on_ahead() -> None:
    def on_rank(comm: Communicator) -> tuple[Tensor, Tensor]:
        model = training.net()
        optimizer: Any = hvd_sketch.DistributedOptimizer(
            adamw(model), model.named_parameters(), SHARDED, comm=comm, error_feedback=Anticipate()
        )
        training.train(optimizer, model, 3, comm.rank)
        other, twin = copy.deepcopy((model, optimizer), {id(comm): comm})
        training.train(optimizer, model, range(3, 6), comm.rank)
        training.train(twin, other, range(3, 6), comm.rank)
        return training.flat(model), training.flat(other)

    for ended, twins in run_in_process(2, on_rank):
        assert torch.equal(ended, twins)
