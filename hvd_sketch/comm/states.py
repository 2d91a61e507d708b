"""States of tensors, numbers and strings, from one rank to all."""

from __future__ import annotations

import io
from typing import Any

import torch

from hvd_sketch.comm.base import Communicator


def broadcast_state(comm: Communicator, state: Any, root: int, name: str) -> Any:
    """The root's state, on every rank; what others give is ignored.

    Two broadcasts, of the length and of the bytes. Only tensors, numbers, strings and their lists and dicts are read.
    """
    file = io.BytesIO()
    if comm.rank == root:
        torch.save(state, file)
    length = torch.tensor([file.getbuffer().nbytes], dtype=torch.int64, device="cpu")
    comm.broadcast(length, root, f"{name}.length")
    payload = torch.empty(int(length), dtype=torch.uint8, device="cpu")
    if comm.rank == root:
        payload.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
    comm.broadcast(payload, root, f"{name}.state")
    return torch.load(io.BytesIO(payload.numpy().tobytes()), map_location="cpu", weights_only=True)
