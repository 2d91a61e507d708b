"""Horovod's ranks in groups that share a memory, by process sets, over both of its controllers."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_sketch as sketched
from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.hosts import find_hosts
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.exchange import HierarchicalExchange
from tests.exchange.test_hierarchical import TOTAL, make, trained
from tests.support.compressors import PLAIN, SHARDED
from tests.support.ranks import Launcher, ranks
from tests.support.simulation import heavy_tailed, step
from tests.support.training import flat, loss, net

Ran = tuple[Tensor, Tensor]
STEPS = (3, 2, 3, 4)
"""Of each rank, before it joins."""


def exchanged(comm: Communicator) -> Ran:
    """Updates of four steps, of which one is void, and what this rank's part of the host's memory is in the end."""
    gradients = heavy_tailed(4, 4, TOTAL)
    gradients[3, 2, 100] = math.nan
    exchange = make(SHARDED, comm, 2)
    updates = torch.stack([step(exchange, gradient) for gradient in gradients[comm.rank]])
    return updates.nan_to_num(nan=0.5), exchange.part.memory.residual


def wrapped(model: torch.nn.Module, **options: Any) -> Any:
    return sketched.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        Compression.sharded(ratio=8.0, anticipate=False, **PLAIN),
        **options,
    )


def joined(rank: int) -> tuple[Tensor, int]:
    """A model after the steps of its ranks, and which of them was the last."""
    model = net()
    optimizer = wrapped(model, hierarchical=2)
    for number in range(STEPS[rank]):
        optimizer.zero_grad()
        loss(model, rank, number).backward()
        optimizer.step()
    last = sketched.join()
    return flat(model), last


def told_of_a_problem(rank: int) -> str:
    model = net()
    optimizer = wrapped(model, hierarchical=2)
    if rank == 3:
        optimizer.exchange.fail_together("it has one")
    loss(model, rank, 0).backward()
    with pytest.raises(ConfigurationError) as told:
        optimizer.step()
    return str(told.value)


def refused(**options: Any) -> str:
    with pytest.raises(ConfigurationError) as told:
        wrapped(net(), **options)
    return str(told.value)


def over_horovod(rank_variable: str) -> dict[str, Any]:
    """Everything on real ranks, which Gloo's controller, and we, are told to be two on each of two hosts."""
    rank = int(os.environ[rank_variable])
    os.environ.update(
        HOROVOD_DYNAMIC_PROCESS_SETS="1",
        HOROVOD_HOSTNAME=f"host{rank // 2}",
        HOROVOD_LOCAL_RANK=str(rank % 2),
        HOROVOD_LOCAL_SIZE="2",
        HOROVOD_CROSS_RANK=str(rank // 2),
        HOROVOD_CROSS_SIZE="2",
    )
    import horovod.torch as hvd

    from hvd_sketch.comm.horovod import HorovodCommunicator

    hvd.init()
    before, hosts = wrapped(net()).exchange, wrapped(net(), hierarchical=True).exchange
    value = torch.full((3,), float(rank))
    hosts.part.comm.broadcast(value, 1, "value")
    told = {
        "by itself": isinstance(before, HierarchicalExchange),
        "across": (hosts.part.comm.rank, hosts.part.comm.size, float(value[0])),
        "exchanged": exchanged(HorovodCommunicator()),
        "trained": trained(None, rank),
        "problem": told_of_a_problem(rank),
        "joined": joined(rank),
    }
    del os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"]
    told["note"] = find_hosts(HorovodCommunicator())
    told["refused"] = refused(hierarchical=True)
    return told


@pytest.mark.filterwarnings("ignore:hvd_sketch. step")
@pytest.mark.parametrize(
    ("launcher", "rank_variable"), [("horovodrun-gloo", "HOROVOD_RANK"), ("mpirun", "OMPI_COMM_WORLD_RANK")]
)
def test_ranks_of_horovod_share_a_memory_by_process_sets(launcher: Launcher, rank_variable: str) -> None:
    """As ranks of one process do, to the bit where sums are ours. Only Gloo's controller believes in two hosts."""
    by_gloo = launcher == "horovodrun-gloo"
    runs = ranks(4, over_horovod, rank_variable, launcher=launcher, timeout=300)
    simulated = run_in_process(4, exchanged)
    model, counters = run_in_process(4, lambda comm: trained(comm, comm.rank))[0]
    for rank, told in enumerate(runs):
        assert told["by itself"] == by_gloo
        assert told["across"] == (rank // 2, 2, 2.0 + rank % 2)
        assert all(torch.equal(one, other) for one, other in zip(told["exchanged"], simulated[rank], strict=True))
        assert torch.equal(told["trained"][0], runs[0]["trained"][0])
        assert torch.allclose(told["trained"][0], model, rtol=0, atol=1e-5)
        assert told["trained"][1]["local_bytes"] == counters["local_bytes"]
        assert "rank 3: it has one" in told["problem"]
        assert torch.equal(told["joined"][0], runs[3]["joined"][0])
        assert told["joined"][1] == 3
        assert (told["note"][0], "HOROVOD_DYNAMIC_PROCESS_SETS=1" in told["note"][1]) == (None, by_gloo)
        assert "HOROVOD_DYNAMIC_PROCESS_SETS=1" in told["refused"]
