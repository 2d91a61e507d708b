"""Whether what all ranks were to receive came alike to all of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.copies import majority, thrice
from hvd_sketch.errors import RankMismatchError

_BITS = 32


def check_alike(comm: Communicator, checksum: int, what: str, name: str) -> None:
    """Collective: compare the checksums (32 bits) of what the ranks received; sums 96 numbers.

    Raises:
        RankMismatchError: alike on all ranks, when it differs: a message was damaged.
    """
    bits = torch.tensor([checksum >> place & 1 for place in range(_BITS)], dtype=torch.int32, device="cpu")
    message = thrice(bits)
    comm.allreduce(message, f"{name}.alike")
    if any(told not in (0, comm.size) for told in majority(message.tolist())):
        raise RankMismatchError(
            f"{comm.in_words(what)} did not come alike to all ranks: a message was damaged on its way, and nothing of "
            "it was used; look at the network, and go on from a checkpoint"
        )


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
