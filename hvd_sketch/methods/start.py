"""All ranks begin with one rank's tensors."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.alike import check_alike


def start_alike(comm: Communicator, tensors: Iterable[Tensor], root: int, name: str) -> None:
    """Collective: take over a rank's tensors, parameters and buffers of one form on all ranks.

    Raises:
        RankMismatchError: alike on all ranks, when they did not come alike.
    """
    checksums = []
    for tensor in tensors:
        value = tensor.detach().contiguous()
        comm.broadcast(value, root, name)
        tensor.detach().copy_(value)
        checksums.append(wire.checksum(value.view(-1).view(torch.uint8)))
    check_alike(comm, zlib.crc32(repr(checksums).encode()), f"the model of rank {root}", name)
