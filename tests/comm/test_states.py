"""States from one rank to all: they arrive as they are, take no more memory than they have, and are not unpickled."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy
import psutil
import pytest
import torch
from torch import nn

from hvd_sketch import ConfigurationError
from hvd_sketch.comm import Communicator, as_communicator
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.comm.states import broadcast_pickled, broadcast_state
from tests.support.ranks import ranks

STATE: dict[Any, Any] = {
    "state": {0: {"step": torch.tensor(3.0), "buffer": torch.arange(6.0).view(2, 3).t()}, 1: {}},
    "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-3, "foreach": None, "nesterov": True, "params": [0, 1]}],
    "odd": [math.inf, 2**40, "é", [], (), {}, torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16)],
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


@pytest.mark.parametrize("broadcast", [broadcast_state, broadcast_pickled])
def test_what_arrives_is_what_was_sent(broadcast: Any) -> None:
    assert all(run_in_process(3, lambda c: same(broadcast(c, STATE if c.rank == 1 else None, 1, "state"), STATE)))


def test_numbers_of_numpy_are_numbers() -> None:
    received = run_in_process(2, lambda comm: broadcast_state(comm, {"lr": numpy.float64(0.5)}, 0, "state"))
    assert received[1] == {"lr": 0.5}


@pytest.mark.parametrize(
    ("broadcast", "value", "expected"),
    [
        (broadcast_state, {"of": argparse.Namespace()}, "the state has a Namespace"),
        (broadcast_pickled, lambda: None, "pickle"),
    ],
)
def test_what_cannot_be_sent_is_told_on_all_ranks(broadcast: Any, value: Any, expected: str) -> None:
    def body(comm: Communicator) -> str:
        with pytest.raises(ConfigurationError, match=expected) as told:
            broadcast(comm, value, 1, "value")
        return str(told.value)

    assert len(set(run_in_process(2, body))) == 1


def test_any_object_can_be_pickled_and_its_tensors_travel_beside_it() -> None:
    layer = nn.Linear(3, 2)

    def body(comm: Communicator) -> bool:
        value = {"options": argparse.Namespace(lr=0.1), "layer": layer} if comm.rank == 0 else None
        received = broadcast_pickled(comm, value, 0, "object")
        assert received["options"].lr == 0.1
        assert isinstance(received["layer"].weight, nn.Parameter)
        return torch.equal(received["layer"].weight, layer.weight)

    assert all(run_in_process(2, body))


COUNT = 2**24


def broadcast_at_a_cost() -> list[float]:
    """The growth of the process's highest memory over what the state has, by the way it is sent."""
    from mpi4py import MPI

    comm = as_communicator(MPI.COMM_WORLD)
    broadcast_state(comm, {"warm": torch.ones(10)}, 0, "warm")
    told = []
    for broadcast in (broadcast_state, broadcast_pickled):
        state = {"a": torch.ones(COUNT), "b": [torch.ones(COUNT)]} if comm.rank == 0 else None
        before = highest()
        received: Any = broadcast(comm, state, 0, "state")
        told.append((highest() - before) / (8 * COUNT))
        assert received["b"][0][-1] == 1.0
        del received, state
    return told


def highest() -> int:
    """Bytes; the largest that the process ever had, or has now."""
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return max(peak, int(psutil.Process().memory_info().rss))


def test_broadcasts_cost_what_they_carry() -> None:
    """On the root nothing of its size; elsewhere the state itself, and what the network needs under way."""
    for rank, grown in enumerate(ranks(2, broadcast_at_a_cost)):
        assert all(share < (0.6 if rank == 0 else 1.6) for share in grown), (rank, grown)
