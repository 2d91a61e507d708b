"""Whether all ranks train the same thing, and what to tell every one of them when they do not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import RankMismatchError


def agree(comm: Communicator, answers: dict[str, str], name: Callable[[str], str]) -> int:
    """How many ranks took part and gave the same answers: sums 33 floats, if they are the same.

    Raises:
        RankMismatchError: alike on all ranks, when they differ, with what differs.
    """
    lanes = torch.zeros(1 + wire.DIGEST_BITS, dtype=torch.float32)
    lanes[0] = 1.0
    wire.write_digest(lanes[1:], torch.frombuffer(bytearray(repr(answers).encode()), dtype=torch.uint8))
    comm.allreduce(lanes, name("agree"))
    if not wire.digests_agree(lanes[1:], lanes[0]):
        raise RankMismatchError(_differences(comm.allgather_object(answers, name("differences"))))
    return int(lanes[0])


def _differences(answers: list[dict[str, str]]) -> str:
    """Where the ranks' answers, of the same questions, differ from rank 0's, and the remedy."""
    lines = ["hvd_sketch: the ranks disagree, so their gradients cannot be combined:"]
    for key in answers[0]:
        for rank, answer in enumerate(answers):
            if answer.get(key) != answers[0][key]:
                ours = sorted(set(answers[0][key].split()) - set(answer.get(key, "").split()))
                theirs = sorted(set(answer.get(key, "").split()) - set(answers[0][key].split()))
                lines.append(f"  {key}: rank 0 has {' '.join(ours[:5])!r}, rank {rank} has {' '.join(theirs[:5])!r}")
    lines.append("Give every rank the same model, compression settings and seed; load a saved memory on all or none;")
    lines.append("call broadcast_optimizer_state and then broadcast_parameters before the first step.")
    return "\n".join(lines)
