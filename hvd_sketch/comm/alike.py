"""Whether what all ranks were to receive came alike to all of them."""

from __future__ import annotations

import torch

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
