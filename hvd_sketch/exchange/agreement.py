"""Whether all ranks train the same thing, and what to tell every one of them when they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import RankMismatchError

Answers = Mapping[str, str]


def agree(
    comm: Communicator,
    answers: Answers,
    name: Callable[[str], str],
    settle: Callable[[Sequence[Answers]], bool] = lambda told: False,
) -> int:
    """How many ranks took part and gave the same answers: sums 33 floats, if they are the same.

    Args:
        comm: the ranks.
        answers: of this rank, by question.
        name: of a collective.
        settle: given the answers of all ranks where they differ; whether it has removed the difference, alike on all.

    Raises:
        RankMismatchError: alike on all ranks, when they differ, with what differs.
    """
    lanes = torch.zeros(1 + wire.DIGEST_BITS, dtype=torch.float32, device="cpu")
    lanes[0] = 1.0
    wire.write_digest(lanes[1:], torch.frombuffer(bytearray(repr(answers).encode()), dtype=torch.uint8))
    comm.allreduce(lanes, name("agree"))
    if not wire.digests_agree(lanes[1:], lanes[0]):
        gathered = comm.allgather_object(dict(answers), name("differences"))
        told = [told or next(filter(None, gathered)) for told in gathered]  # a rank that has joined differs from none
        if not settle(told):
            raise RankMismatchError(_differences(told))
    return int(lanes[0])


def newcomers(told: Sequence[Answers], question: str, new: str) -> list[int]:
    """Ranks that answer this one question with ``new`` where all others answer alike; none if more differs."""
    ranks = [rank for rank, answers in enumerate(told) if answers[question] == new]
    known = {answers[question] for answers in told} - {new}
    rest = {tuple(answer for key, answer in answers.items() if key != question) for answers in told}
    return ranks if len(known) == len(rest) == 1 else []


def _differences(answers: Sequence[Answers]) -> str:
    """Where the ranks' answers, of the same questions, differ from rank 0's, and the remedy."""
    lines = ["hvd_sketch: the ranks disagree, and nothing was exchanged:"]
    for key in answers[0]:
        for rank, answer in enumerate(answers):
            if answer.get(key) != answers[0][key]:
                ours = sorted(set(answers[0][key].split()) - set(answer.get(key, "").split()))
                theirs = sorted(set(answer.get(key, "").split()) - set(answers[0][key].split()))
                lines.append(f"  {key}: rank 0 has {' '.join(ours[:5])!r}, rank {rank} has {' '.join(theirs[:5])!r}")
    lines.append("Give every rank the same model, compression settings and seed; load a saved memory that fits on")
    lines.append("all, on none, or on rank 0 alone; call broadcast_optimizer_state and then broadcast_parameters")
    lines.append("before the first step.")
    return "\n".join(lines)
