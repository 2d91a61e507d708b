"""Large messages by shared memory are those that another communicator would send, and nothing stays behind."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.comm import Communicator, shared_memory
from hvd_sketch.comm.in_process import run_in_process
from hvd_sketch.comm.shared_memory import SharedMemory
from tests.comm import test_backends

SIZES = (20_000, 30_000, 10, 50_000, 50_000, 20_000)
"""Elements of a message; some make a table anew, and one is sent."""


def messages(comm: Communicator) -> list[Tensor]:
    """What a rank has of sums and gathers of all these, one kind after the other and in pairs."""
    generator = torch.Generator().manual_seed(comm.rank)
    found = []
    for number, size in enumerate(SIZES):
        for kind in (torch.float32, torch.float64, torch.int32):
            rows = (1000 * torch.randn(comm.size, size, generator=generator)).to(kind)
            found.append(comm.reduce_scatter(rows, "sum", lambda came: None))
            for _ in range(1 + number % 2):
                found.append(comm.allgather(rows[0], "gather").clone())
                rows += 1
    return found


def left_behind() -> list[Path]:
    return list(Path("/dev/shm").glob("hvd_sketch.*"))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_messages_and_bytes_are_the_other_communicators(ranks: int) -> None:
    def body(comm: Communicator) -> bool:
        shared = SharedMemory(comm)
        told = messages(shared)
        assert shared._tables[0].numel() > 0
        assert shared._tables[1].numel() > 0
        for expected, found in zip(messages(comm), told, strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
        messages(shared)  # from here on both tables are large enough for any of them
        before = shared.bytes_sent
        messages(shared)
        assert shared.bytes_sent - before == comm.bytes_sent
        return True

    assert all(run_in_process(ranks, body))
    assert not left_behind()


def test_it_is_a_communicator() -> None:
    assert all(run_in_process(3, lambda comm: test_backends.check(SharedMemory(comm))))


@pytest.mark.parametrize("missing", ["room", "folder", "file of another host"])
def test_messages_are_sent_where_memory_cannot_be_shared(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def absent(path: str, nbytes: int) -> Tensor | None:
        return mapped(path, nbytes) if next(calls) else None

    mapped, calls = shared_memory._mapped, itertools.count()
    if missing == "room":
        monkeypatch.setattr(os, "posix_fallocate", full)
    elif missing == "folder":
        monkeypatch.setattr(shared_memory, "_FOLDER", Path("/nowhere"))
    else:
        monkeypatch.setattr(shared_memory, "_mapped", absent)

    def body(comm: Communicator) -> bool:
        shared = SharedMemory(comm)
        told = messages(shared)
        assert not shared._possible
        return all(map(torch.equal, told, messages(comm)))

    assert all(run_in_process(3, body))
    assert not left_behind()
