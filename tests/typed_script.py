"""A user's script, to be type-checked and not run: what the public surface offers, and what it does not."""

from collections.abc import Iterable
from typing import assert_type

import torch
from torch import nn

import hvd_sketch as hvd
from hvd_sketch.methods.server import Plain


def train(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """The drop-in, with all that its result offers."""
    hvd.init()
    torch.manual_seed(hvd.rank() + hvd.size() + hvd.local_rank())
    compression = hvd.Compression.sharded(ratio=40, schedule=hvd.Guard(40), exclude=("*.bias",))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
        grad_scaler=torch.amp.GradScaler("cpu"),
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
        scheduler.step()
    assert_type(optimizer.exchange.stats.ratio, float)
    assert_type(optimizer.exchange.stats.bytes_sent, int)
    optimizer.flush()
    state = optimizer.memory_state_dict()
    optimizer.load_memory_state_dict(state)
    optimizer.backward_passes_per_step = 2
    assert_type(hvd.exchange_of(compression).stats, hvd.Stats)


def train_ahead(model: nn.Module, batch: torch.Tensor) -> None:
    """With a method against misleading errors."""
    optimizer = hvd.DistributedOptimizer(
        torch.optim.AdamW(model.parameters()),
        model.named_parameters(),
        compression=hvd.Compression.sketch(ratio=40, in_turn=0.75),
        error_feedback=hvd.Anticipate(second_moments=hvd.FactoredMoments()),
    )
    with optimizer.step_ahead():
        model(batch).sum().backward()
    optimizer.step()
    optimizer.flush()
    assert_type(optimizer.exchange.stats, hvd.Stats)
    assert_type(optimizer.exchange.update, torch.Tensor)
    optimizer.load_memory_state_dict(optimizer.memory_state_dict())


def train_locally(model: nn.Module, batch: torch.Tensor) -> None:
    """A method of its own."""
    optimizer = hvd.LocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.1), model, compression=hvd.Compression.auto(ratio=40), period=4
    )
    model(batch).sum().backward()
    optimizer.step()
    with optimizer.average_model() as averaged:
        assert_type(averaged, nn.Module)
    assert_type(optimizer.stats.skipped, int)
    assert_type(optimizer.exchange.stats, hvd.Stats)


def train_with_a_server(model: nn.Module, batches: Iterable[torch.Tensor], blocks: list[torch.Tensor]) -> None:
    """Workers and a server, in the three ways."""
    code = hvd.Compression.topk(ratio=40)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with hvd.AsyncSGD(sgd, model, period=4, up=code, down=code, rule=Plain()) as optimizer:
        for batch in optimizer.work(batches):
            assert_type(batch, torch.Tensor)
            model(batch).sum().backward()
            optimizer.step()
        with optimizer.server_model() as served:
            assert_type(served, nn.Module)
    assert_type(optimizer.stats.workers[1].refused, int)
    hvd.FedAT(sgd, model, period=4, tiers=3, weights="samples", patience=10.0)
    with hvd.ADSAGA(model, components=len(blocks), smoothness=1.0) as saga:
        for component in saga.work(100):
            assert_type(component, int)
            saga.step(component)


def mistakes(model: nn.Module) -> None:
    """Each of these lines is an error to the type checker, or the comment behind it is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hvd.Gaurd(40)  # type: ignore[attr-defined]
    hvd.Compression.sketched(ratio=40)  # type: ignore[attr-defined]
    hvd.Compression.sketch(ration=40)  # type: ignore[call-arg]
    hvd.Guard("40")  # type: ignore[arg-type]
    hvd.AsyncSGD(optimizer, model, perod=4)  # type: ignore[call-arg]
    hvd.FedAT(optimizer, model)  # type: ignore[call-arg]
    hvd.DistributedOptimizer(optimizer).flush()  # type: ignore[attr-defined]
    hvd.DistributedOptimizer(optimizer, compression=hvd.Compression.topk()).step_ahead()  # type: ignore[attr-defined]
    hvd.DistributedOptimizer(  # type: ignore[call-overload]
        optimizer, compression=hvd.Compression.topk(), error_feedback=hvd.Anticipate
    )
