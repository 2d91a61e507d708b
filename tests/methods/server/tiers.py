"""What ranks do with `FedAT` for the tests."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch.methods.server import FedAT, Polyline
from tests.methods.server.support import Vector


class Federated(NamedTuple):
    model: Tensor
    tiers: dict[int, int]
    rounds: list[int]
    pushes: int
    bytes_sent: int


def federate(comm: Any, seconds: float) -> Federated:
    """Four workers, of which 2 and 4 are slow; every local step goes a tenth of the way to the worker's number."""
    model = Vector(torch.zeros(100))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = FedAT(
        sgd, model, comm, period=2, tiers=2, clients=2, samples=1 + comm.rank, code=Polyline(4), proximal=0.1
    )
    with optimizer:
        end = time.monotonic() + seconds
        for _ in optimizer.work(iter(lambda: time.monotonic() < end, False)):
            time.sleep(0.06 if comm.rank in (2, 4) else 0.004)
            model.x.grad = model.x.detach() - float(comm.rank)
            optimizer.step()
    rule, stats = optimizer.tiers, optimizer.stats
    return Federated(model.x.detach(), rule.tier_of, rule.rounds, stats.pushes, stats.bytes_sent)
